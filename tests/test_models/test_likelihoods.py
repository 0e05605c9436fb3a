"""Likelihoods of captions: as the cross-entropy says, in the teacher's one pass."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.models import DualLoopModel, GRPOObjective, generation
from projects.llava_sam2_rl.models.captioning import caption_logits, caption_loss
from projects.llava_sam2_rl.models.generation import no_gradient
from projects.llava_sam2_rl.models.objectives.grpo_caption_to_mask import CaptionToMask
from projects.llava_sam2_rl.models.prompting import caption_ids
from projects.llava_sam2_rl.rewards import CaptionLikelihoodReward
from projects.llava_sam2_rl.structures import RegionSample
from projects.llava_sam2_rl.utils.modules import eval_mode
from test_models.batches import encode, randomize_lora

LIKELIHOOD = {'type': 'CaptionLikelihoodReward'}
OTHER = {'type': 'CaptionLikelihoodReward', 'contrast': 'other_region'}
CLOSE = dict(atol=2e-4, rtol=1e-3)
SIZE = (60, 80)


@pytest.fixture(scope='module')
def regions(tiny_transform) -> dict:
    """Two objects of one image with a text each; one object alone; a text that nothing fits."""
    image = np.full((*SIZE, 3), 90, np.uint8)
    left, right = np.zeros((2, *SIZE), bool)
    left[20:40, 8:28] = right[20:40, 50:70] = True
    image[left], image[right] = (200, 0, 0), (0, 0, 200)
    shared = dict(image=image, source='own')
    both = np.stack([left, right])
    two = RegionSample(
        mask=both, region_captions=('a red square', 'a blue square'), sample_id='two', **shared
    )
    one = RegionSample(mask=left, caption='a red square', sample_id='one', **shared)
    none = RegionSample(
        mask=np.zeros((0, *SIZE), bool), caption='a star', sample_id='none', **shared
    )
    return sa2va_collate([tiny_transform(sample) for sample in (two, one, none)])


def build(tiny_model, limit=40, only=None, **options) -> DualLoopModel:
    randomize_lora(tiny_model.policy, 0.05)
    objective = GRPOObjective(num_generations=2, **options)
    weights = {} if only is None else {d: {'weight': float(d == only)} for d in DIRECTIONS}
    return DualLoopModel(tiny_model.policy, objective, max_new_tokens=limit, **weights)


DIRECTIONS = ('mask_to_caption', 'caption_to_mask')


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """How many sequences each decoding loop wrote."""
    calls = []
    decode = generation._decode

    def counted(policy, active, *args):
        calls.append(len(active.index))
        return decode(policy, active, *args)

    monkeypatch.setattr(generation, '_decode', counted)
    return calls


def grids_of(monkeypatch) -> list:
    """The cells of the masks of each step."""
    seen = []
    masks = CaptionToMask.masks

    def spy(self, *args):
        seen.append(masks(self, *args))
        return seen[-1]

    monkeypatch.setattr(CaptionToMask, 'masks', spy)
    return seen


def test_the_reward_is_what_the_cross_entropy_of_the_caption_says(tiny_model, batch, monkeypatch):
    """By the pass that SFT learns captions with, one rollout at a time."""
    seen = grids_of(monkeypatch)
    model = build(tiny_model, caption_to_mask={'reward': LIKELIHOOD, 'sigma': 2.0})
    encoded = encode(model, batch)
    torch.manual_seed(0)
    rewards = model.rollout(encoded)['caption_to_mask'].rewards.rewards
    samples = [i for i in encoded.captioned for _ in range(2)]
    assert len(rewards) == len(samples) == 6
    with eval_mode(model.policy), torch.no_grad(), model.teacher_applied():
        for n, (i, grid) in enumerate(zip(samples, seen[0].prompt_masks, strict=True)):
            loss = caption_loss(model.policy, encoded, [i], [grid])
            torch.testing.assert_close(rewards[n], torch.exp(-loss.value), **CLOSE)
    assert len(set(rewards.tolist())) > 3


def test_masks_of_the_same_cells_score_the_same_to_the_bit(tiny_model, batch, monkeypatch):
    """Or rounding would pass for a difference that could be learnt."""
    masks = CaptionToMask.masks

    def pairwise(self, *args):
        found = masks(self, *args)
        for n in (1, 3, 5):
            found.prompt_masks[n] = found.prompt_masks[n - 1].clone()
        return found

    monkeypatch.setattr(CaptionToMask, 'masks', pairwise)
    model = build(tiny_model, only='caption_to_mask', caption_to_mask={'reward': LIKELIHOOD})
    rewards = model.rollout(encode(model, batch))['caption_to_mask'].rewards.rewards
    assert rewards[0::2].tolist() == rewards[1::2].tolist()
    assert (rewards > 0).all()


@pytest.mark.parametrize('directions', [('caption_to_mask',), DIRECTIONS])
def test_it_is_part_of_the_teachers_one_pass(tiny_model, regions, monkeypatch, directions):
    passes = []
    hidden_states = type(tiny_model.policy).hidden_states
    model = build(
        tiny_model,
        only=directions[0] if len(directions) == 1 else None,
        mask_to_caption={'reward': OTHER},
        caption_to_mask={'reward': OTHER},
    )

    def counted(policy, *args, **kwargs):
        passes.append((model.teacher._applied, torch.is_grad_enabled()))
        return hidden_states(policy, *args, **kwargs)

    monkeypatch.setattr(type(model.policy), 'hidden_states', counted)
    model(**regions, mode='loss')
    # The policy's mean actions; return trip, references and likelihoods; what is learnt.
    assert passes == [(False, False), (True, False), (False, True)]


METEOR = {'type': 'MeteorReward', 'synonyms': 'off'}
MIXED = {'type': 'WeightedRewards', 'rewards': [LIKELIHOOD, {**METEOR, 'weight': 0}]}


@pytest.mark.parametrize(
    ('reward', 'draw', 'written'),
    [
        (LIKELIHOOD, False, []),
        (LIKELIHOOD, True, [6]),
        ({'type': 'MaskIoUReward'}, False, []),
        (METEOR, False, [6]),
        (MIXED, False, [6]),
        ({'type': 'PermutedReward', 'reward': LIKELIHOOD}, False, []),
    ],
)
def test_captions_are_written_only_where_somebody_reads_them(
    tiny_model, batch, decoded, monkeypatch, reward, draw, written
):
    # Whatever the policy draws has a region that could be described.
    monkeypatch.setattr(
        'projects.llava_sam2_rl.models.objectives.grpo_caption_to_mask.prompt_mask_grid',
        lambda mask, size: torch.ones(1, size, size, dtype=torch.bool),
    )
    model = build(tiny_model, 4, 'caption_to_mask', caption_to_mask={'reward': reward})
    model.objective.draw_rollouts = draw
    found = model.rollout(encode(model, batch))['caption_to_mask']
    assert decoded == written
    assert (found.reward_inputs.completions is None) == (not written)
    assert len(found.captions) == sum(written)
    assert torch.isfinite(found.rewards.rewards).all()


def test_mask_to_caption_writes_nothing_but_what_it_samples(tiny_model, batch, decoded):
    model = build(tiny_model, 4, caption_to_mask={'reward': LIKELIHOOD})
    model(**batch, mode='loss')
    assert decoded == [8]


def test_other_regions_of_the_image_and_what_stands_for_them(tiny_model, regions):
    model = build(tiny_model, caption_to_mask={'reward': OTHER})
    encoded = encode(model, regions)
    losses, metrics = model.losses(encoded, rollouts := model.rollout(encoded))
    inputs = rollouts['caption_to_mask'].reward_inputs
    shapes = [None if x is None else len(x) for x in inputs.caption_logps_other_regions]
    assert shapes == [1, 1, 1, 1, 1, 1, None, None]
    policy = model.policy
    whole = torch.ones(1, policy.grid_size, policy.grid_size, dtype=torch.bool)
    for n, i, grid in (
        # The one object of two is told from the other, the one that is alone from the image.
        (0, 0, encoded.prompt_masks[1]),
        (2, 1, encoded.prompt_masks[0]),
        (4, 2, whole),
    ):
        with eval_mode(policy), torch.no_grad(), model.teacher_applied():
            loss = caption_loss(policy, encoded, [i], [grid]).value
        torch.testing.assert_close(-inputs.caption_logps_other_regions[n].mean(), loss, **CLOSE)
    assert metrics['loop2/num_images_with_one_region'] == 1
    assert metrics['loop2/num_captions_cut'] == 0
    # Nothing can be said of what is not there: that reward is the mask's.
    assert inputs.references[6:] == [None, None]
    assert set(rollouts['caption_to_mask'].rewards.rewards[6:].tolist()) <= {0.0, 1.0}
    assert all(torch.isfinite(loss.value) for loss in losses.values())


@pytest.mark.parametrize('direction', DIRECTIONS)
def test_an_image_with_one_region_scores_as_by_no_mask(tiny_model, regions, direction):
    """And is counted; an image with two does not fall back."""
    scores = []
    for contrast in ('other_region', 'no_mask'):
        reward = {'type': 'CaptionLikelihoodReward', 'contrast': contrast}
        torch.manual_seed(0)
        model = build(tiny_model, 6, direction, **{direction: {'reward': reward}})
        encoded = encode(model, regions)
        torch.manual_seed(1)
        found = model.rollout(encoded)[direction]
        scores.append(found.rewards.rewards)
        assert found.metrics.get('num_images_with_one_region') == (
            1 if contrast == 'other_region' else None
        )
    names = found.reward_inputs.sample_ids
    alone = torch.tensor([name == 'own/one' for name in names])
    assert int(alone.sum()) == 2
    torch.testing.assert_close(scores[0][alone], scores[1][alone], **CLOSE)
    two = torch.tensor(['own/two' in name for name in names])
    assert not torch.allclose(scores[0][two], scores[1][two], atol=1e-4)


def test_a_sampled_caption_is_read_of_its_region_and_of_the_others(tiny_model, regions):
    model = build(tiny_model, 6, 'mask_to_caption', mask_to_caption={'reward': OTHER})
    encoded = encode(model, regions)
    found = model.rollout(encoded)['mask_to_caption']
    drawn, policy = found.completions, model.policy
    ids = [row[m].tolist() for row, m in zip(drawn.completion_ids, drawn.completion_mask)]
    for n, i, other in ((0, 0, 1), (3, 1, 0)):
        logps = []
        for region in (i, other):
            part = dataclasses.replace(
                encoded, prompt_masks=[encoded.prompt_masks[region]] * len(encoded)
            )
            with eval_mode(policy), torch.no_grad(), model.teacher_applied():
                logits = caption_logits(policy, part, [i], [ids[n]]).log_softmax(-1)
            logps.append(logits.gather(1, torch.tensor(ids[n])[:, None]).mean())
        expected = torch.stack(logps).softmax(0)[0]
        torch.testing.assert_close(found.rewards.rewards[n], expected, **CLOSE)
    assert found.metrics['num_images_with_one_region'] == 1


def test_a_caption_longer_than_the_limit_is_scored_over_what_fits(tiny_model, regions):
    model = build(tiny_model, only='caption_to_mask', caption_to_mask={'reward': LIKELIHOOD})
    encoded = encode(model, regions)
    inputs = []
    for limit in (40, 3):
        model.objective.max_new_tokens = limit
        torch.manual_seed(0)
        rollout = model.rollout(encoded)['caption_to_mask']
        inputs.append(rollout.reward_inputs.caption_logps)
        lengths = [len(caption_ids(model.policy, encoded.captions[i])) for i in (0, 1, 2)]
        cut = sum(length > limit for length in lengths)
        assert rollout.metrics['num_captions_cut'] == cut == (3 if limit == 3 else 0)
    found = [(a, b) for a, b in zip(*inputs, strict=True) if a is not None]
    assert found
    for whole, part in found:
        assert len(part) == 3 < len(whole)
        torch.testing.assert_close(part, whole[:3], **CLOSE)


def test_masks_without_a_cell_and_captions_without_a_word(tiny_model, batch, monkeypatch):
    masks = CaptionToMask.masks

    def first_is_empty(self, *args):
        found = masks(self, *args)
        found.prompt_masks[0][:] = False
        return found

    monkeypatch.setattr(CaptionToMask, 'masks', first_is_empty)
    model = build(
        tiny_model,
        only='caption_to_mask',
        caption_to_mask={'reward': {**OTHER, 'reduction': 'sum'}},
    )
    encoded = encode(model, batch)
    encoded.captions[2] = ' '
    found = model.rollout(encoded)['caption_to_mask']
    rewards = found.rewards.rewards
    assert rewards[0] == 0
    assert rewards[2:4].isnan().all()
    assert (rewards[[1, 4, 5]] >= 0).all()
    assert found.metrics['num_masks_without_cell'] >= 1
    assert found.advantages[2:4].tolist() == [0.0, 0.0]


def test_nothing_but_blank_captions_asks_nothing(tiny_model, regions):
    model = build(tiny_model, only='caption_to_mask', caption_to_mask={'reward': LIKELIHOOD})
    encoded = encode(model, regions).subset([3])
    found = model.rollout(encoded)['caption_to_mask']
    assert found.reward_inputs.caption_logps == [None, None]
    assert set(found.rewards.rewards.tolist()) <= {0.0, 1.0}


def test_a_batch_scores_as_its_samples_alone(tiny_model, regions):
    """Same masks: what else is asked in the pass makes no difference."""
    model = build(tiny_model, caption_to_mask={'reward': OTHER})
    encoded, direction = encode(model, regions), model.objective.caption_to_mask
    with no_gradient(), eval_mode(model.policy):
        actions = direction.sample(model.policy, encoded)
        masks = direction.masks(model.policy, encoded, actions)
        together = model.objective._teacher_pass(
            model.policy, model.teacher, encoded, None, masks
        ).likelihoods['caption_to_mask']
        alone = encoded.subset([2])
        own = type(masks)(masks.logits[4:6], masks.prompt_masks[4:6])
        apart = model.objective._teacher_pass(
            model.policy, model.teacher, alone, None, own
        ).likelihoods['caption_to_mask']
    for name, column in apart.fields.items():
        for a, b in zip(column, together.fields[name][4:6], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **CLOSE)


def test_the_config_of_the_reward_is_json(tmp_path):
    """It stands in dumped configs and reports."""
    assert json.loads(json.dumps(OTHER)) == OTHER
    assert CaptionLikelihoodReward(contrast='other_region').needs[1].endswith('other_regions')


def test_generated_records_of_several_objects_leave_none_without_another(
    tiny_model, tiny_transform
):
    scenes = GeneratedScenes(4, num_regions=2, split='val', transforms=tiny_transform)
    model = build(tiny_model, 6, 'mask_to_caption', mask_to_caption={'reward': OTHER})
    found = model.rollout(encode(model, sa2va_collate([scenes[0], scenes[1]])))['mask_to_caption']
    assert len(found.samples) == 4
    assert found.metrics['num_images_with_one_region'] == 0
