"""CaptionLikelihoodReward by hand, and what rewards say they need."""

from __future__ import annotations

import math

import pytest
import torch

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards import (
    CaptionLikelihoodReward,
    MeteorReward,
    PermutedReward,
    RolloutBatch,
    WeightedRewards,
    needs_of,
)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([math.log(p) for p in probabilities])


#: Geometric mean sqrt(1/8), product 1/8; the other two sqrt(1/32), 1/32 and as the own.
OWN = logs(1 / 2, 1 / 4)
NO_MASK = logs(1 / 4, 1 / 8)
OTHERS = torch.stack([logs(1 / 4, 1 / 8), logs(1 / 4, 1 / 2)])


def batch(direction='caption_to_mask', **change) -> RolloutBatch:
    fields = dict(
        completions=None,
        num_generations=1,
        direction=direction,
        references=['a dog'],
        caption_logps=[OWN],
        caption_logps_no_mask=[NO_MASK],
        caption_logps_other_regions=[OTHERS],
    )
    return RolloutBatch(**{**fields, **change})


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, math.sqrt(1 / 8)),
        ({'reduction': 'sum'}, 1 / 8),
        # sqrt(1/8) / (sqrt(1/8) + sqrt(1/32)), and sqrt(1/32) is half of sqrt(1/8).
        ({'contrast': 'no_mask'}, 2 / 3),
        ({'contrast': 'no_mask', 'reduction': 'sum'}, 4 / 5),
        # 1 / (1 + 1/2 + 1), and 4 / (4 + 1 + 4).
        ({'contrast': 'other_region'}, 0.4),
        ({'contrast': 'other_region', 'reduction': 'sum'}, 4 / 9),
    ],
)
def test_by_hand(options, expected):
    reward = REWARDS.build({'type': 'CaptionLikelihoodReward', **options})
    assert reward(batch()) == pytest.approx([expected])
    # In the other direction it is the completion that is likely or not.
    written = batch('mask_to_caption', references=None, completions=[''])
    assert reward(written) == pytest.approx([expected])


def test_a_mask_without_a_cell_scores_nothing_and_no_caption_declines():
    found = batch(
        num_generations=4,
        references=['a dog', 'a dog', ' ', None],
        caption_logps=[OWN, None, None, None],
        caption_logps_no_mask=[NO_MASK, NO_MASK, None, None],
        caption_logps_other_regions=[OTHERS, OTHERS, None, None],
    )
    for contrast in ('none', 'no_mask', 'other_region'):
        scores = CaptionLikelihoodReward(contrast=contrast)(found)
        assert scores[0] > 0
        assert scores[1:] == [0.0, None, None]


def test_a_certain_caption_scores_one_and_an_impossible_one_nearly_nothing():
    # Rounding may leave a log-prob of a certain token above 0.
    certain = batch(caption_logps=[torch.tensor([1e-6, 0.0])])
    assert CaptionLikelihoodReward()(certain) == [1.0]
    impossible = batch(caption_logps=[torch.full((200,), -90.0)])
    for contrast in ('none', 'no_mask', 'other_region'):
        (score,) = CaptionLikelihoodReward('sum', contrast)(impossible)
        assert 0 <= score < 1e-12


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'reduction': 'max'}, "reduction='max' is unknown: use mean or sum"),
        ({'contrast': 'mask'}, "contrast='mask' is unknown: use one of none, no_mask, other_reg"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        CaptionLikelihoodReward(**options)


def test_what_rewards_need():
    likelihood, meteor = CaptionLikelihoodReward(contrast='no_mask'), MeteorReward('off')
    assert needs_of(likelihood) == ('caption_logps', 'caption_logps_no_mask')
    assert needs_of(meteor) == ('completions',)
    assert needs_of(REWARDS.build({'type': 'MaskIoUReward'})) == ()
    assert needs_of(likelihood, meteor) == (
        'caption_logps',
        'caption_logps_no_mask',
        'completions',
    )
    # What wraps others needs what they need, the logged ones (weight 0) included.
    weighted = WeightedRewards(
        [
            {'type': 'CaptionLikelihoodReward'},
            {'type': 'MeteorReward', 'synonyms': 'off', 'weight': 0},
        ]
    )
    assert needs_of(weighted) == ('caption_logps', 'completions')
    assert needs_of(PermutedReward(likelihood)) == needs_of(likelihood)
    # A reward that says nothing reads texts, as all did before.
    plain = type('Plain', (), {'name': 'plain'})()
    assert needs_of(plain) == ('completions',)


def test_a_need_that_no_batch_has_is_named():
    reward = type('Misspelt', (), {'name': 'x', 'needs': ('caption_logp',)})()
    with pytest.raises(ValueError, match=r"needs 'caption_logp'.*did you mean 'caption_logps'"):
        needs_of(reward)


@pytest.mark.parametrize(
    ('reward', 'words'),
    [
        (CaptionLikelihoodReward(), 'CaptionLikelihoodReward needs caption_logps'),
        (MeteorReward('off'), 'MeteorReward needs completions'),
        (REWARDS.build({'type': 'LengthReward'}), 'LengthReward needs completions'),
    ],
)
def test_what_was_not_filled_in_is_named(reward, words):
    with pytest.raises(ValueError, match=words):
        reward(batch(caption_logps=None))


def test_a_batch_has_the_length_of_what_it_holds():
    assert len(batch(num_generations=2, references=None, **dict.fromkeys(FIELDS, [OWN] * 4))) == 4
    with pytest.raises(ValueError, match='3 references do not divide'):
        batch(num_generations=2, references=['a'] * 3)
    with pytest.raises(ValueError, match='needs a list at least'):
        batch(references=None, **dict.fromkeys(FIELDS))


FIELDS = ('caption_logps', 'caption_logps_no_mask', 'caption_logps_other_regions')
