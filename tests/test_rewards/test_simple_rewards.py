"""LengthReward, MaskConfidenceReward, MaskIoUReward and MeteorReward on small batches."""

import math

import pytest
import torch
from nltk.translate.meteor_score import single_meteor_score

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards import RolloutBatch
from projects.llava_sam2_rl.rewards.meteor import NoSynonyms


def batch(completions=('a',), **fields):
    return RolloutBatch(list(completions), 1, 'mask_to_caption', **fields)


def test_length_by_hand():
    reward = REWARDS.build(
        {'type': 'LengthReward', 'min_words': 3, 'max_words': 5, 'softness': 2.0}
    )
    texts = ['', 'one', 'one  two\nthree', 'a b c d', 'a b c d e', 'a b c d e f', 'a b c d e f g']
    expected = [math.exp(-1.5), math.exp(-1), 1, 1, 1, math.exp(-0.5), math.exp(-1)]
    assert reward(batch(texts)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ('options', 'words'),
    [({'min_words': 5, 'max_words': 4}, 'min_words=5'), ({'softness': 0}, 'softness')],
)
def test_length_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        REWARDS.build({'type': 'LengthReward', **options})


def test_confidence_by_hand():
    reward = REWARDS.build({'type': 'MaskConfidenceReward'})
    # sigmoid(ln 3) = 3/4 -> 0.5; sigmoid(ln 7) = 7/8 -> 0.75; outside pixels do not count.
    region = torch.tensor([[math.log(3), math.log(7)], [-5.0, -0.1]])
    empty = torch.full((2, 2), -3.0)
    logits = [region[None], empty[None], torch.stack([region, empty]), torch.full((1, 2, 2), 99.0)]
    assert reward(batch('abcd', pred_mask_logits=logits)) == pytest.approx(
        [0.625, 0.0, 0.3125, 1.0]
    )


def test_mask_rewards_stay_in_range_for_any_logits():
    odd = [torch.full((1, 2, 2), value) for value in (math.nan, math.inf, -math.inf, 0.0, 1e30)]
    gt = [torch.tensor([[[True, False], [False, False]]])] * 5
    rollouts = batch('abcde', pred_mask_logits=odd, gt_masks=gt)
    assert REWARDS.build({'type': 'MaskConfidenceReward'})(rollouts) == [0, 1, 0, 0, 1]
    assert REWARDS.build({'type': 'MaskIoUReward'})(rollouts) == [0, 0.25, 0, 0, 0.25]


def test_iou_is_the_mean_over_regions():
    logits = torch.tensor([[[1.0, 1.0, -1.0]], [[-1.0, -1.0, -1.0]]])
    gt = torch.tensor([[[True, False, False]], [[False, False, False]]])
    rollouts = batch(pred_mask_logits=[logits], gt_masks=[gt])
    # 1 of 2, and two empty masks agree
    assert REWARDS.build({'type': 'MaskIoUReward'})(rollouts) == [0.75]


def test_iou_of_a_caption_of_nothing_and_of_several():
    inside, outside = torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), -1.0)
    corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])[None]
    nothing, everything = torch.zeros(0, 2, 2, dtype=torch.bool), inside > 0
    pairs = [
        (outside, nothing),
        (inside, nothing),
        (outside, ~everything),
        (corner, ~everything),
        (outside, everything),
        # Two of two in another order, and one of two.
        (torch.cat([corner, inside]), torch.cat([inside, corner]) > 0),
        (corner, torch.cat([inside, corner]) > 0),
    ]
    logits, gt = zip(*pairs, strict=True)
    rollouts = batch('abcdefg', pred_mask_logits=logits, gt_masks=gt)
    assert REWARDS.build({'type': 'MaskIoUReward'})(rollouts) == [1, 0, 1, 0, 0, 1, 0.5]


@pytest.mark.parametrize('name', ['MaskIoUReward', 'MaskConfidenceReward'])
def test_mask_rewards_without_masks_say_what_is_missing(name):
    with pytest.raises(ValueError, match='pred_mask_logits'):
        REWARDS.build({'type': name})(batch())


def test_meteor_declines_without_a_reference():
    reward = REWARDS.build({'type': 'MeteorReward', 'synonyms': 'off'})
    texts = ['a red car', 'a red car', 'a red car', '', 'The red truck!']
    references = ['a red car', None, ' . ', 'a red car', 'a red car']
    rewards = reward(batch(texts, references=references))
    assert rewards[1:4] == [None, None, 0.0]
    tokens = (['a', 'red', 'car'], ['the', 'red', 'truck'])
    assert rewards[4] == pytest.approx(single_meteor_score(*tokens, wordnet=NoSynonyms()))
    assert rewards[0] == pytest.approx(1 - 0.5 / 27)
    assert reward(batch(['x'])) == [None]
