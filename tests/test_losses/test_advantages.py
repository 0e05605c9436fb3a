import math

import pytest
import torch

from projects.llava_sam2_rl.losses import group_advantages, group_statistics
from projects.llava_sam2_rl.losses.advantages import zero_variance

NAN = math.nan


def test_group_scaling_by_hand():
    # mean 2, deviations -1 0 1, Bessel std 1; second group mean 4, std sqrt(8) over two members.
    rewards = torch.tensor([1.0, 2.0, 3.0, 2.0, 6.0, NAN])
    expected = [-1 / 1.0001, 0.0, 1 / 1.0001, -2 / 2.8285271, 2 / 2.8285271, 0.0]
    assert group_advantages(rewards, 3).tolist() == pytest.approx(expected, abs=1e-6)


def test_batch_scaling_by_hand():
    # all six: mean 3.5, squared deviations 6.25 2.25 .25 .25 2.25 6.25 = 17.5, / 5 -> std 1.870829
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    scale = math.sqrt(3.5) + 1e-4
    expected = [-1 / scale, 0.0, 1 / scale] * 2
    assert group_advantages(rewards, 3, 'batch').tolist() == pytest.approx(expected, abs=1e-6)


def test_batch_std_leaves_out_the_unscorable():
    # scorable 0, 2, 4: mean 2, std 2; group means 1 and 4, and the 4 is alone in its group.
    advantages = group_advantages(torch.tensor([0.0, 2.0, 4.0, NAN]), 2, 'batch')
    assert advantages.tolist() == pytest.approx([-1 / 2.0001, 1 / 2.0001, 0.0, 0.0], abs=1e-6)


def test_no_scaling_only_centres():
    rewards = torch.tensor([1.0, 4.0, NAN, 10.0, 30.0, 20.0])
    assert group_advantages(rewards, 3, 'none').tolist() == [-1.5, 1.5, 0.0, -10.0, 10.0, 0.0]


@pytest.mark.parametrize('scale', ['group', 'batch', 'none'])
def test_equal_rewards_and_lone_members_give_exactly_zero(scale):
    # In float64 the mean of three 0.1 is not 0.1.
    rewards = [0.1, 0.1, 0.1, NAN, NAN, NAN, 0.7, NAN, NAN, 1.0, 2.0, 3.0]
    rewards = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_advantages(rewards, 3, scale)
    assert advantages[:9].tolist() == [0.0] * 9
    assert (advantages[9:] != 0).tolist() == [True, False, True]


def test_nothing_scorable_is_zero_and_not_nan():
    assert group_advantages(torch.full((4,), NAN), 2, 'batch').tolist() == [0.0] * 4


def test_dtype_and_gradient():
    rewards = torch.tensor([0.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    advantages = group_advantages(rewards, 2)
    assert advantages.dtype == torch.bfloat16
    assert not advantages.requires_grad


@pytest.mark.parametrize(
    ('rewards', 'group', 'scale', 'words'),
    [
        (torch.zeros(4), 1, 'group', 'got 1'),
        (torch.zeros(5), 2, 'group', '5 rewards .* num_generations=2'),
        (torch.zeros(4), 2, 'groups', "'groups' is unknown: use one of group, batch, none"),
        (torch.zeros(2, 2), 2, 'group', r'\(2, 2\)'),
        (torch.tensor([0.0, math.inf]), 2, 'group', '1 of 2 rewards are infinite'),
        (torch.zeros(4), 0, 'none', 'got 0'),
    ],
)
def test_bad_input_is_named(rewards, group, scale, words):
    with pytest.raises(ValueError, match=words):
        group_advantages(rewards, group, scale)


def test_group_of_one_without_group_scaling_is_allowed():
    assert group_advantages(torch.tensor([1.0, 2.0]), 1, 'none').tolist() == [0.0, 0.0]


def test_statistics_by_hand():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0, NAN, NAN, 2.0, NAN])
    stats = group_statistics(rewards, 2)
    assert stats['reward'].item() == pytest.approx(16 / 5)
    # groups of two scorable: std sqrt(2) and 0
    assert stats['reward_std'].item() == pytest.approx(math.sqrt(2) / 2)
    # the group of equals and the group with one scorable, of four
    assert stats['frac_reward_zero_std'].item() == 0.5
    assert stats['frac_reward_unscorable'].item() == 3 / 8
    assert stats['num_groups_unscorable'].item() == 1
    assert not any('loss' in name for name in stats)


def test_zero_variance_marks_whole_groups():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0, NAN, NAN, 2.0, NAN])
    assert zero_variance(rewards, 2).tolist() == [False, False] + [True] * 6
