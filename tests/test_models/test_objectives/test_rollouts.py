"""The record of a rollout, and of how many items its loss is the mean."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from projects.llava_sam2_rl.losses import RewardLossHead
from projects.llava_sam2_rl.models.objectives.rollouts import Rollout, num_loss_items
from projects.llava_sam2_rl.rewards import RewardOutput

#: Two groups of two completions of 3, 1, 2 and 0 tokens; the second group's rewards are equal.
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.5])


def scored(rewards: torch.Tensor) -> Rollout:
    return Rollout(samples=[0, 1], rewards=RewardOutput(rewards, rewards[:, None], ('fixed',)))


def head(**options) -> RewardLossHead:
    return RewardLossHead(num_generations=2, **{'reduction': 'dapo', **options})


@pytest.mark.parametrize('reduction', ['grpo', 'bnpo', 'dr_grpo'])
def test_a_loss_over_completions_counts_completions(reduction):
    assert num_loss_items(head(reduction=reduction), scored(REWARDS), MASK) == 4


def test_a_loss_over_tokens_counts_active_tokens():
    assert num_loss_items(head(), scored(REWARDS), MASK) == 6


def test_groups_that_are_dropped_do_not_count():
    dropping = head(drop_zero_variance_groups=True)
    assert num_loss_items(dropping, scored(REWARDS), MASK) == 4


def test_truncated_completions_that_are_dropped_do_not_count():
    truncated = torch.tensor([True, False, False, False])
    assert num_loss_items(head(drop_truncated=True), scored(REWARDS), MASK, truncated) == 3
    assert num_loss_items(head(), scored(REWARDS), MASK, truncated) == 6


def test_completions_without_a_reward_stay_in_the_count():
    """Their advantage is 0; their KL to the reference is not."""
    unscored = torch.tensor([float('nan'), 1.0, 0.5, 0.5])
    assert num_loss_items(head(), scored(unscored), MASK) == 6


def test_a_record_does_not_change():
    rollout = scored(REWARDS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollout.advantages = REWARDS
    # What synchronisation adds makes a new record of the same parts.
    added = dataclasses.replace(rollout, advantages=REWARDS)
    assert added.rewards is rollout.rewards
    assert rollout.advantages is None


def test_rewards_that_are_read_have_to_be_there():
    assert scored(REWARDS).scored.rewards is REWARDS
    with pytest.raises(ValueError, match='no rewards'):
        _ = Rollout(samples=[0]).scored
