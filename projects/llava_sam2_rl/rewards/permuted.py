"""The control experiment: does a run learn because of its reward?"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards.base import Reward, RewardOutput, RolloutBatch, score


@REWARDS.register_module()
class PermutedReward:
    """Another reward's scores, shuffled among the rollouts of each group.

    Groups keep their means, spreads and zero-variance share, so that the updates are as large as in
    the real run; only which rollout earned what is lost. What a run still gains with it, it did not
    learn from the reward. The parts stay as they were scored.

    Args:
        reward: The reward or its config.
        seed: Of the shuffling.
    """

    name = 'permuted'

    def __init__(self, reward: Reward | dict[str, Any], seed: int = 0) -> None:
        self.reward: Reward = REWARDS.build(dict(reward)) if isinstance(reward, dict) else reward
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rollouts: RolloutBatch) -> list[float | None]:
        """One number per rollout, ``None`` where the shuffled score is unscorable."""
        return [None if r != r else r for r in self.score(rollouts).rewards.tolist()]

    def score(self, rollouts: RolloutBatch) -> RewardOutput:
        """The same with the parts of the reward."""
        output = score(self.reward, rollouts)
        groups = output.rewards.view(-1, rollouts.num_generations)
        order = torch.rand(groups.shape, generator=self.generator).argsort(1)
        return dataclasses.replace(output, rewards=groups.gather(1, order).flatten())
