import math

import pytest
import torch

from projects.llava_sam2_rl.losses import group_advantages, group_statistics
from projects.llava_sam2_rl.losses.advantages import (
    decoupled_advantages,
    summed_advantages,
    zero_variance,
)

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


#: First group: deviations -1 0 1 and 1 -1 0, each with a standard deviation of 1. Second group: the
#: first reward declined, the second 5 and 7 (standard deviation sqrt 2); one has no reward at all.
TERMS = torch.tensor([[0.0, 2.0], [1.0, 0.0], [2.0, 1.0], [NAN, 5.0], [NAN, NAN], [NAN, 7.0]])
WEIGHTS = (1.0, 2.0)


def test_rewards_normalised_one_by_one_by_hand():
    other = 2 / (math.sqrt(2) + 1e-4)
    expected = [1 / 1.0001, -2 / 1.0001, 1 / 1.0001, -other, other]
    summed = summed_advantages(TERMS, WEIGHTS, 3)
    assert summed[4].isnan()
    assert summed[[0, 1, 2, 3, 5]].tolist() == pytest.approx(expected, abs=1e-9)
    # Of the five: mean 0, squares 1 + 4 + 1 (over 1.0001²) and 2 · other².
    std = math.sqrt((6 / 1.0001**2 + 2 * other**2) / 4)
    found = decoupled_advantages(TERMS, WEIGHTS, 3)
    assert found.tolist() == pytest.approx(
        [*(x / (std + 1e-4) for x in expected[:4]), 0.0, expected[4] / (std + 1e-4)], abs=1e-6
    )
    assert found.dtype == TERMS.dtype


def test_a_reward_that_hardly_varies_counts_as_much_as_its_weight_says():
    """Summed first, the second reward is drowned: a hundredth of the first one's spread."""
    terms = torch.tensor([[0.0, 0.01], [1.0, 0.0], [0.0, 0.0], [1.0, 0.01]])
    summed_first = group_advantages(terms.sum(1), 4)
    assert summed_first[3] / summed_first[1] < 1.05
    apart = decoupled_advantages(terms, (1.0, 1.0), 4)
    assert apart[3] > 0.9
    # What gains one and loses the other is worth nothing.
    assert apart[:2].abs().max() < 0.02


def test_parts_of_a_batch_are_divided_by_the_whole_ones_spread():
    whole = decoupled_advantages(TERMS, WEIGHTS, 3)
    summed = summed_advantages(TERMS, WEIGHTS, 3)
    std = summed[~summed.isnan()].std()
    parts = [decoupled_advantages(TERMS[rows], WEIGHTS, 3, std) for rows in (slice(3), slice(3, 6))]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_equal_rewards_one_by_one_give_exactly_zero():
    terms = torch.full((4, 2), 0.1)
    assert decoupled_advantages(terms, WEIGHTS, 4).tolist() == [0.0] * 4
    with pytest.raises(ValueError, match=r'terms is \(4, 2\): one column for each of 3 weights'):
        decoupled_advantages(terms, (1.0, 1.0, 1.0), 4)
