"""One pass for all prompts about the images of a batch answers as a pass for each."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from projects.llava_sam2_rl.models.captioning import caption_logits, sample_captions
from projects.llava_sam2_rl.models.generation import Completions, Sampling, no_gradient
from projects.llava_sam2_rl.models.segmentation import seg_embeddings
from projects.llava_sam2_rl.models.shared_prefix import SharedPrefixForward
from projects.llava_sam2_rl.prompts import questions
from test_models.batches import encode, randomize_lora

CLOSE = dict(atol=2e-4, rtol=1e-3)


@pytest.fixture
def policy(tiny_model):
    randomize_lora(tiny_model.policy, 0.05)
    return tiny_model.policy.eval()


@pytest.fixture
def encoded(tiny_model, batch):
    return encode(tiny_model, batch)


@pytest.fixture
def read(policy, monkeypatch) -> list[int]:
    """Positions of each pass of the language model."""
    passes = []
    original = type(policy).hidden_states

    def counted(self, embeds, *args, **kwargs):
        passes.append(embeds.shape[0] * embeds.shape[1])
        return original(self, embeds, *args, **kwargs)

    monkeypatch.setattr(type(policy), 'hidden_states', counted)
    return passes


def given(texts_ids: list[list[int]], width: int = 4) -> Completions:
    """Completions of these tokens."""
    ids = torch.zeros(len(texts_ids), width, dtype=torch.long)
    mask = torch.zeros(len(texts_ids), width, dtype=torch.bool)
    for n, row in enumerate(texts_ids):
        ids[n, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[n, : len(row)] = True
    count = len(texts_ids)
    return Completions(
        completion_ids=ids,
        completion_mask=mask,
        per_token_logps=torch.zeros(count, width),
        texts=[''] * count,
        truncated=torch.zeros(count, dtype=torch.bool),
    )


def test_both_kinds_of_prompt_in_one_pass(policy, encoded, read):
    """Log-probs, entropy, `[SEG]` embeddings and the answer's loss, by passes of their own."""
    torch.manual_seed(0)
    with no_gradient():
        drawn = sample_captions(policy, encoded, 2, Sampling(max_new_tokens=5))
    texts, images, names = ['a star', 'a red circle', 'x'], [0, 0, 4], ['a', 'b', 'c']

    shared = SharedPrefixForward(policy, encoded)
    captions = shared.add_captions(drawn)
    described = shared.add_descriptions(texts, images, names)
    shared.forward()
    assert len(read) == 1
    logps, entropy = shared.per_token_logps(captions, 0.7, return_entropy=True)
    found = shared.seg_embeddings(described)
    answer = shared.answer_loss(described)

    expected, loss = seg_embeddings(
        policy, encoded, texts, images, names, weights=[None] * 3, answer_loss=True
    )
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(answer, loss, **CLOSE)

    lengths = drawn.completion_mask.sum(1).tolist()
    ids = [row[:n].tolist() for row, n in zip(drawn.completion_ids, lengths, strict=True)]
    logits = caption_logits(policy, encoded, [i for i in range(4) for _ in range(2)], ids) / 0.7
    whole = logits.log_softmax(-1)
    flat = drawn.completion_ids[drawn.completion_mask]
    plain = whole.gather(1, flat[:, None])[:, 0]
    torch.testing.assert_close(logps[drawn.completion_mask], plain, **CLOSE)
    own = -(whole.exp() * whole).sum(-1)
    torch.testing.assert_close(entropy[drawn.completion_mask], own, **CLOSE)
    assert not logps[~drawn.completion_mask].any()
    assert not entropy[~drawn.completion_mask].any()


def test_completions_of_one_token_and_of_none(policy, encoded):
    """The prompt's last token predicts the first; one token has no node of its own."""
    part = encoded.subset([0, 1])
    completions = given([[40], [], [30, 31, 32], [50]])
    shared = SharedPrefixForward(policy, part)
    handles = shared.add_captions(completions)
    assert [node == -1 for node in handles.nodes] == [True, True, False, True]
    shared.forward()
    logps, entropy = shared.per_token_logps(handles, 1.0)
    assert entropy is None
    logits = caption_logits(policy, part, [0, 1, 1], [[40], [30, 31, 32], [50]])
    flat = torch.tensor([40, 30, 31, 32, 50])
    plain = logits.log_softmax(-1).gather(1, flat[:, None])[:, 0]
    torch.testing.assert_close(logps[completions.completion_mask], plain, **CLOSE)


def test_the_images_tokens_are_read_once(policy, encoded, read):
    """More questions about an image cost their own words alone."""
    for count in (1, 5):
        shared = SharedPrefixForward(policy, encoded)
        shared.add_descriptions(['a star'] * count, [0] * count, ['x'] * count)
        shared.forward()
    one, five = read
    assert one > policy.num_image_tokens
    assert 0 < five - one < 4 * (one - policy.num_image_tokens) + 1


def test_nothing_asked_runs_nothing(policy, encoded, monkeypatch):
    monkeypatch.setattr(type(policy), 'hidden_states', None)
    SharedPrefixForward(policy, encoded).forward()


def test_a_batch_equals_its_samples_one_by_one(policy, encoded):
    completions = given([[30, 31, 32], [40], [50, 51], [60, 61, 62, 63]])

    def logps(part, chosen):
        shared = SharedPrefixForward(policy, part)
        handles = shared.add_captions(chosen)
        shared.forward()
        return shared.per_token_logps(handles, 1.0)[0]

    together = logps(encoded, completions)
    for i in range(4):
        own = dataclasses.replace(
            completions,
            completion_ids=completions.completion_ids[i : i + 1],
            completion_mask=completions.completion_mask[i : i + 1],
        )
        torch.testing.assert_close(logps(encoded.subset([i]), own), together[i : i + 1], **CLOSE)


def test_the_gradient_is_that_of_passes_of_their_own(policy, encoded):
    completions = given([[30, 31, 32], [40], [50, 51], [60, 61, 62, 63]])
    watched = [p for n, p in policy.named_parameters() if 'lora_B' in n or 'mlp1.1' in n]
    shared = SharedPrefixForward(policy, encoded)
    handles = shared.add_captions(completions)
    shared.forward()
    total = shared.per_token_logps(handles, 1.0)[0].sum()
    found = torch.autograd.grad(total, watched)
    ids = [
        row[m].tolist() for row, m in zip(completions.completion_ids, completions.completion_mask)
    ]
    logits = caption_logits(policy, encoded, [0, 1, 2, 3], ids)
    flat = torch.tensor([token for row in ids for token in row])
    plain = logits.log_softmax(-1).gather(1, flat[:, None]).sum()
    for a, b in zip(found, torch.autograd.grad(plain, watched), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()), rtol=1e-3)


def test_a_missing_seg_names_the_sample(policy, encoded, monkeypatch):
    monkeypatch.setattr(questions, 'SEGMENTATION_ANSWERS', ('It is here.',))
    shared = SharedPrefixForward(policy, encoded)
    handles = shared.add_descriptions(['a star'], [0], ['the star'])
    shared.forward()
    with pytest.raises(ValueError, match=r"'the star': expected 1 \[SEG\].*found 0"):
        shared.seg_embeddings(handles)
