"""The first task: greedy captions, their cross-entropy, their logits."""

from __future__ import annotations

import functools
import operator

import pytest
import torch

from projects.llava_sam2_rl.models.captioning import (
    caption_logits,
    caption_loss,
    conversation_loss,
    sample_captions,
    write_captions,
)
from projects.llava_sam2_rl.models.generation import Sampling
from projects.llava_sam2_rl.models.prompting import region_texts
from projects.llava_sam2_rl.prompts import encode_prompt
from test_models.batches import encode, only


def test_captions_of_a_batch_equal_one_by_one(tiny_model, batch):
    policy = tiny_model.policy
    captions = write_captions(policy, encode(tiny_model, batch), 24)
    assert all(captions)
    for i in range(4):
        assert write_captions(policy, encode(tiny_model, only(batch, i)), 24) == [captions[i]]


def test_a_region_without_a_cell_is_described_by_nothing(tiny_model, batch):
    encoded = encode(tiny_model, batch)
    grids = [torch.zeros_like(encoded.prompt_masks[0]), *encoded.prompt_masks[1:]]
    expected = write_captions(tiny_model.policy, encoded, 24)
    found = write_captions(tiny_model.policy, encoded, 24, prompt_masks=grids)
    assert found == ['', *expected[1:]]
    grids = [torch.zeros_like(grid) for grid in grids]
    assert write_captions(tiny_model.policy, encoded, 24, prompt_masks=grids) == [''] * 4


def test_captions_end_at_the_limit(tiny_model, batch):
    policy, encoded = tiny_model.policy, encode(tiny_model, batch)
    short = write_captions(policy, encoded, 2)
    assert all(0 < len(encode_prompt(policy.tokenizer, text)) <= 2 for text in short)


def test_writing_captions_restores_the_training_mode(tiny_model, batch):
    tiny_model.train()
    modes = {name: module.training for name, module in tiny_model.policy.named_modules()}
    assert modes['mlp1']
    assert not modes['vision_model']
    with tiny_model.teacher_applied():
        write_captions(tiny_model.policy, encode(tiny_model, batch), 24)
    assert {n: m.training for n, m in tiny_model.policy.named_modules()} == modes


def test_sampling_draws_a_group_for_each_region(tiny_model, batch):
    torch.manual_seed(0)
    encoded = encode(tiny_model, batch)
    drawn = sample_captions(tiny_model.policy.eval(), encoded, 3, Sampling(max_new_tokens=5))
    assert drawn.completion_ids.shape == drawn.completion_mask.shape == (12, 5)
    assert not drawn.per_token_logps.requires_grad
    assert len(set(drawn.texts)) > 4


def test_caption_loss_is_the_mean_over_all_caption_tokens(tiny_model, batch):
    encoded = encode(tiny_model, batch)
    tokenizer = tiny_model.policy.tokenizer
    with torch.no_grad():
        both = caption_loss(tiny_model.policy, encoded, [0, 2])
        singles = [caption_loss(tiny_model.policy, encoded, [i]) for i in (0, 2)]
    counts = [
        len(tokenizer.encode(encoded.captions[i] + '<|end|>', add_special_tokens=False))
        for i in (0, 2)
    ]
    assert [int(loss.count) for loss in singles] == counts
    assert both.count == sum(counts)
    expected = sum(n * loss.value for n, loss in zip(counts, singles, strict=True)) / sum(counts)
    torch.testing.assert_close(both.value, expected)


def test_position_t_predicts_token_t_whatever_the_prompts_length(tiny_model, batch):
    policy = tiny_model.policy.eval()
    encoded = encode(tiny_model, batch)
    captions = [[30, 31, 32], [40], [50, 51, 52, 53, 54]]
    together = caption_logits(policy, encoded, [0, 1, 2], captions)
    start = 0
    for i, ids in enumerate(captions):
        text = region_texts(policy, encoded, [i], [encoded.prompt_masks[i]])[0]
        prompt = encode_prompt(policy.tokenizer, text)
        # The model's own forward on this sample alone; logits[n] predicts token n + 1.
        single = {
            'input_ids': torch.tensor([prompt + ids]),
            'attention_mask': torch.ones(1, len(prompt) + len(ids), dtype=torch.bool),
            'pixel_values': [batch['data']['pixel_values'][i]],
            'vp_overall_mask': torch.tensor([True]),
            'prompt_masks': [batch['data']['prompt_masks'][i]],
        }
        logits = policy.forward(single, mode='tensor')['logits'][0]
        expected = logits[len(prompt) - 1 : len(prompt) + len(ids) - 1]
        torch.testing.assert_close(together[start : start + len(ids)], expected, rtol=0, atol=2e-5)
        start += len(ids)
    assert start == len(together)


@pytest.mark.parametrize('factor', [1.0, 0.25])
def test_cell_weights_scale_the_regions_embeddings(tiny_model, batch, factor):
    policy, encoded = tiny_model.policy.eval(), encode(tiny_model, batch)
    grids = [encoded.prompt_masks[0]]
    weights = [torch.full(grids[0].shape, factor, requires_grad=True)]
    plain = caption_loss(policy, encoded, [0])
    weighted = caption_loss(policy, encoded, [0], grids, weights)
    if factor == 1.0:
        torch.testing.assert_close(weighted.value, plain.value)
    else:
        assert not torch.isclose(weighted.value, plain.value)
    weighted.value.backward()
    # Of the region's cells, and of no other.
    reached = weights[0].grad != 0
    assert reached.any()
    assert not (reached & ~grids[0]).any()


def test_the_loss_of_a_conversation_is_that_of_the_models_own_forward(tiny_model, mixed):
    policy = tiny_model.policy.eval()
    found = conversation_loss(policy, encode(tiny_model, mixed), [1])
    tokens = policy.tokenizer.encode
    # Written out: xtuner's phi3_chat turns, the image before the first question.
    image = '<img>' + '<IMG_CONTEXT>' * policy.num_image_tokens + '</img>\n'
    parts = [
        (f'<|user|>\n{image}What is it?<|end|>\n<|assistant|>\n', False),
        ('a circle.<|end|>', True),
        ('\n', False),
        ('<|user|>\nWhere?<|end|>\n<|assistant|>\n', False),
        ('in the center<|end|>', True),
        ('\n', False),
    ]
    ids = [tokens(text, add_special_tokens=False) for text, _ in parts]
    labels = [row if said else [-100] * len(row) for row, (_, said) in zip(ids, parts)]
    flat = torch.tensor([functools.reduce(operator.iadd, ids, [])])
    expected = policy.forward(
        {
            'input_ids': flat,
            'attention_mask': torch.ones_like(flat, dtype=torch.bool),
            'labels': torch.tensor([functools.reduce(operator.iadd, labels, [])]),
            'pixel_values': [mixed['data']['pixel_values'][1]],
        },
        mode='tensor',
    )['loss']
    torch.testing.assert_close(found.value, expected)
    said = sum(len(tokens(x, add_special_tokens=False)) for x, own in parts if own)
    assert found.count == said
