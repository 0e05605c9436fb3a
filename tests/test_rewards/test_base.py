import math

import pytest
import torch

from projects.llava_sam2_rl.rewards import (
    Reward,
    RewardOutput,
    RewardUnavailableError,
    RolloutBatch,
    WeightedRewards,
    score,
)

OK = {'completions': ['a', 'b'], 'num_generations': 2, 'direction': 'mask_to_caption'}


class Fixed:
    name = 'fixed'

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, rollouts):
        return self.values


def test_score_turns_declined_into_nan():
    output = score(Fixed(0.5, None), RolloutBatch(**OK))
    assert output.rewards[0].item() == 0.5
    assert math.isnan(output.rewards[1])
    assert output.rewards_per_func.shape == (2, 1)
    assert output.names == ('fixed',)
    assert isinstance(Fixed(), Reward)


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        ([0.5], "'fixed' returned 1 values for 2 completions"),
        ([0.5, math.nan], r'nan for r/7 \(rollout 1\)'),
        ([math.inf, 0.0], r'inf for r/7 \(rollout 0\)'),
    ],
)
def test_a_reward_that_breaks_its_contract_is_named(values, words):
    with pytest.raises(ValueError, match=words):
        score(Fixed(*values), RolloutBatch(**OK, sample_ids=['r/7', 'r/7']))


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'direction': 'loop1'}, "'loop1' is unknown: use one of mask_to_caption, caption_to_mask"),
        ({'completions': ['a', 'b', 'c']}, '3 completions .* num_generations=2'),
        ({'references': ['a']}, 'references has 1 entries for 2'),
        (
            {'gt_masks': [torch.ones(4, 4, dtype=torch.bool)] * 2},
            r'rollout 0: gt_masks .* \(4, 4\)',
        ),
        ({'gt_masks': [torch.ones(1, 4, 4)] * 2}, 'float32'),
        ({'pred_mask_logits': [torch.ones(1, 4, 4, dtype=torch.bool)] * 2}, 'bool'),
        (
            {
                'gt_masks': [torch.ones(1, 4, 4, dtype=torch.bool)] * 2,
                'pred_mask_logits': [torch.ones(1, 4, 4), torch.ones(1, 2, 2)],
            },
            r'rollout 1: .* \(1, 2, 2\), gt_masks \(1, 4, 4\)',
        ),
    ],
)
def test_bad_batches_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        RolloutBatch(**{**OK, **change})


def test_output_shapes_are_checked():
    with pytest.raises(ValueError, match=r'\(2, 1\), expected \(2, 2\)'):
        RewardOutput(torch.zeros(2), torch.zeros(2, 1), ('a', 'b'))


class Down:
    """Gives up after it has scored once."""

    name = 'down'

    def __init__(self):
        self.calls = 0

    def __call__(self, rollouts):
        self.calls += 1
        if self.calls > 1:
            raise RewardUnavailableError('nobody answers at http://x')
        return [0.5] * len(rollouts)


def test_a_reward_that_gives_up_leaves_all_unscored_and_says_why():
    weighted = WeightedRewards([{'type': 'MaskConfidenceReward', 'weight': 0}, {'type': Down}])
    batch = RolloutBatch(**OK, pred_mask_logits=[torch.zeros(1, 4, 4)] * 2)
    fine = score(weighted, batch)
    assert fine.failure is None
    assert fine.rewards.tolist() == [0.5, 0.5]
    output = score(weighted, batch)
    assert output.failure == 'nobody answers at http://x'
    assert output.rewards.isnan().all()
    assert output.rewards_per_func.shape == (2, 2)
    assert output.rewards_per_func.isnan().all()
    assert output.names == ('mask_confidence', 'down')


def test_other_errors_of_a_reward_are_errors():
    def broken(rollouts):
        raise RuntimeError('a bug')

    broken.name = 'broken'
    with pytest.raises(RuntimeError, match='a bug'):
        score(broken, RolloutBatch(**OK))
