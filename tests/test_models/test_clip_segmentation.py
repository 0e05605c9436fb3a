"""All frames of a clip at once: the prompt, the order of the masks, and what they cost."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from projects.llava_sam2_rl.datasets import GeneratedMovingScenes, GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.losses import mask as mask_losses
from projects.llava_sam2_rl.models import SFTObjective, clip_segmentation
from projects.llava_sam2_rl.models.batch import encode_batch
from projects.llava_sam2_rl.models.clip_segmentation import find_masks_in_clips
from projects.llava_sam2_rl.models.objectives import GRPOObjective
from projects.llava_sam2_rl.models.prompting import segmentation_prompts
from projects.llava_sam2_rl.models.segmentation import seg_embeddings
from projects.llava_sam2_rl.prompts import IMG_CONTEXT, IMG_END, IMG_START, encode_turns

CLOSE = {'rtol': 0, 'atol': 1e-4}


def clip(count, index, transform, **options):
    clips = GeneratedMovingScenes(
        length=8, num_frames=count, split='val', transforms=transform, **options
    )
    return clips[index]


@pytest.fixture(scope='module')
def mixed(tiny_transform):
    """A clip of four frames, an image, a clip of three with two objects, a pair."""
    scenes = GeneratedScenes(length=8, split='val', transforms=tiny_transform)
    return sa2va_collate(
        [
            clip(4, 0, tiny_transform),
            scenes[1],
            clip(3, 2, tiny_transform, num_regions=2),
            clip(2, 3, tiny_transform),
        ]
    )


def encoded(policy, batch):
    names = [meta.name for meta in batch['data_samples']]
    return encode_batch(policy, batch['data'], names, clips_for_language=True)


def segmented(policy, batch, samples, **options):
    asked = {
        'answer_loss': False,
        'questions': ['Please segment {description}.'] * len(samples),
        'template': policy.chat_template,
    }
    return find_masks_in_clips(policy, batch, samples, **{**asked, **options})


def test_the_frames_stand_in_the_prompt_one_behind_another(tiny_model, mixed):
    policy = tiny_model.policy.eval()
    batch = encoded(policy, mixed)
    assert batch.clip_image == [0, None, 1, 1, None]
    assert batch.clips.num_tiles == (4, 3)
    view = SimpleNamespace(features=batch.clips)
    texts = ['a ball', 'a cat', 'a dog']
    prompts = segmentation_prompts(
        policy, view, texts, [0, 1, 1], ['a', 'b', 'c'], dialogues=[0, 1, 1]
    )
    frame = f'{IMG_START}{IMG_CONTEXT * policy.num_image_tokens}{IMG_END}\n'
    answer = 'It is [SEG].'
    question = policy.questions.segmentation
    expected = [
        [(4 * frame + question.format(description='a ball'), answer)],
        [
            (3 * frame + question.format(description='a cat'), answer),
            (question.format(description='a dog'), answer),
        ],
    ]
    for row, turns in enumerate(expected):
        ids, labels = encode_turns(policy.tokenizer, policy.chat_template, turns)
        length = int(prompts.attention_mask[row].sum())
        assert prompts.input_ids[row, :length].tolist() == ids
        assert prompts.labels[row, :length].tolist() == labels


def test_objects_come_one_behind_another_each_in_all_its_frames(tiny_model, mixed):
    """As `propagate` gives them where every frame is prompted: by itself, without memory."""
    policy = tiny_model.policy.eval()
    batch = encoded(policy, mixed)
    with torch.no_grad():
        found = segmented(policy, batch, [0, 2, 3])
        assert found.low_res.shape[0] == len(found.masks) == 4 + 2 * 3
        first = 0
        for samples in ([0], [2, 3]):
            view = copy.copy(batch)
            object.__setattr__(view, 'features', batch.clips)
            descriptions = [policy.questions.description(batch.captions[i]) for i in samples]
            embeddings, _ = seg_embeddings(
                policy,
                view,
                descriptions,
                [batch.clip_image[i] for i in samples],
                ['x'] * len(samples),
                questions=['Please segment {description}.'] * len(samples),
                dialogues=[0] * len(samples),
            )
            indices = batch.clip[samples[0]]
            frames = [batch.frames.select(slice(k, k + 1)) for k in indices]
            every = policy.propagate(iter(frames), embeddings, num_cond_frames=len(frames))
            rows = slice(first, first + len(samples) * len(frames))
            torch.testing.assert_close(found.low_res[rows], every.flatten(0, 1), **CLOSE)
            wanted = [
                batch.clip_masks[i][t][0] for i in samples for t in range(len(batch.clip_masks[i]))
            ]
            for own, expected in zip(found.masks[rows], wanted, strict=True):
                assert torch.equal(own, expected)
            first = rows.stop


def test_a_batch_finds_what_each_clip_finds_alone(tiny_model, mixed, tiny_transform):
    policy = tiny_model.policy.eval()
    with torch.no_grad():
        together = segmented(policy, encoded(policy, mixed), [0, 2, 3], answer_loss=True)
        first = encoded(policy, sa2va_collate([clip(4, 0, tiny_transform)]))
        second = encoded(policy, sa2va_collate([clip(3, 2, tiny_transform, num_regions=2)]))
        alone = [
            segmented(policy, first, [0], answer_loss=True),
            segmented(policy, second, [0, 1], answer_loss=True),
        ]
    torch.testing.assert_close(
        together.low_res, torch.cat([part.low_res for part in alone]), **CLOSE
    )
    # The answers have as many tokens each.
    mean = (alone[0].answer + 2 * alone[1].answer) / 3
    torch.testing.assert_close(together.answer, mean, **CLOSE)
    assert [part.num_descriptions for part in (together, *alone)] == [3, 1, 2]


@pytest.mark.parametrize('text', ['which one leaves the picture?', 'who leaves? take the first'])
def test_a_question_is_asked_as_it_is(tiny_model, mixed, monkeypatch, text):
    policy = tiny_model.policy.eval()
    batch = encoded(policy, mixed)
    batch.captions[0] = text
    asked = {}

    def seen(*args, questions, **options):
        asked['questions'] = questions
        return seg_embeddings(*args, questions=questions, **options)

    monkeypatch.setattr(clip_segmentation, 'seg_embeddings', seen)
    with torch.no_grad():
        segmented(policy, batch, [0, 2], questions=['Find {description}!'] * 2)
    assert asked['questions'] == ['{description}', 'Find {description}!']


@pytest.mark.parametrize('odd', [0, 1, 2])
def test_sets_are_matched_over_all_frames(tiny_model, mixed, monkeypatch, odd):
    """Two objects whose [SEG] come the other way round in all frames but one."""
    policy = tiny_model.policy.eval()
    batch = encoded(policy, mixed)
    left, right = (torch.zeros(8, 8, dtype=torch.bool) for _ in range(2))
    left[:, :4], right[:, 4:] = True, True
    sample = {'clip': [[0, 1, 2]], 'clip_image': [0], 'captions': ['two things'], 'names': ['a']}
    sample |= {'seg_masks': [torch.stack([left, right])], 'dialogues': [0]}
    sample['clip_masks'] = [[torch.stack([left, right])] * 3]
    view = copy.copy(batch)
    for key, value in sample.items():
        object.__setattr__(view, key, value)
    first = [left if t == odd else right for t in range(3)]
    second = [right if t == odd else left for t in range(3)]
    logits = torch.where(torch.stack([*first, *second]), 9.0, -9.0)[:, None]
    monkeypatch.setattr(type(policy), 'segment', lambda *_: (logits, None, None))
    found = segmented(policy, view, [0])
    # In order the pairs have 1/5 of their union in common, the other way round 2/4: the first [SEG]
    # has the second object, in all three frames.
    expected = [right] * 3 + [left] * 3
    assert all(torch.equal(a, b) for a, b in zip(found.masks, expected, strict=True))


def test_the_loss_is_a_mean_over_images_and_over_objects_in_frames(tiny_model, mixed, monkeypatch):
    def points(like, count, generator):
        fixed = torch.Generator().manual_seed(1)
        return torch.rand(1, count, 2, generator=fixed).expand(len(like), -1, -1)

    monkeypatch.setattr(mask_losses, '_random_points', points)
    objective = SFTObjective(num_points=64, segmentation_questions=['Please segment {description}'])
    policy = tiny_model.policy.train()
    objective.setup(policy, ['caption_to_mask'], 16)
    batch = encoded(policy, mixed)
    losses, _ = objective.losses(policy, batch, {})
    loss = losses['loop2/mask_loss']
    # Two images (a pair is asked about its first frame), one object in 4 frames and two in 3.
    assert loss.count == 2 + 4 + 2 * 3
    assert losses['loop2/answer_loss'].count == 5
    parts = []
    for samples in ([1, 4], [0], [2, 3]):
        own, _ = objective.losses(policy, batch.subset(samples), {})
        parts.append(own)
    for key in losses:
        total = sum(part[key].value * part[key].count for part in parts)
        expected = total / sum(part[key].count for part in parts)
        torch.testing.assert_close(losses[key].value, expected, rtol=1e-5, atol=1e-5)
    loss.value.backward()
    for module in (policy.text_hidden_fcs, policy.grounding_encoder.mask_decoder, policy.mlp1):
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        assert any(float(grad.abs().max()) > 0 for grad in grads)
        policy.zero_grad()
        loss = objective.losses(policy, batch, {})[0]['loop2/mask_loss']
        loss.value.backward()


def test_only_objectives_that_read_clips_pay_for_them(tiny_model, mixed):
    assert SFTObjective().reads_clips
    assert not GRPOObjective().reads_clips
    batch = encode_batch(tiny_model.policy, mixed['data'])
    assert batch.clips is None
    assert batch.clip_image == [None] * 5
    with pytest.raises(ValueError, match='no clips that were encoded for the language model'):
        segmented(tiny_model.policy, batch, [0])
    whole = encoded(tiny_model.policy, mixed)
    with pytest.raises(ValueError, match=r'moving_scenes/val-3-\d.* is no clip of more than two'):
        segmented(tiny_model.policy, whole, [4])
