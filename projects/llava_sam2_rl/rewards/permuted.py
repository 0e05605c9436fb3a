"""The control experiment: does a run learn because of its reward?"""

from __future__ import annotations

from typing import Any

import torch

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards.base import (
    NOTHING_STARTED,
    CompositeReward,
    Reward,
    RewardOutput,
    RolloutBatch,
    Started,
    needs_of,
    part_names,
    score,
)


@REWARDS.register_module()
class PermutedReward(CompositeReward):
    """Another reward's scores, shuffled among the rollouts of each group.

    Groups keep their means, spreads and zero-variance share, so that the updates are as large as in
    the real run; only which rollout earned what is lost. What a run still gains with it, it did not
    learn from the reward. The parts stay as they were scored.

    Args:
        reward: The reward or its config.
        seed: Seed of the shuffling. Defaults to 0.
    """

    name = 'permuted'

    def __init__(self, reward: Reward | dict[str, Any], seed: int = 0) -> None:
        self.reward: Reward = REWARDS.build(dict(reward)) if isinstance(reward, dict) else reward
        self.names, self.needs = part_names(self.reward), needs_of(self.reward)
        self.parts = (self.reward,)
        self.generator = torch.Generator().manual_seed(seed)

    def score(self, rollouts: RolloutBatch, started: Started = NOTHING_STARTED) -> RewardOutput:
        """The reward's output, its rewards shuffled within each group."""
        output = score(self.reward, rollouts, started)
        group = rollouts.num_generations
        draws = torch.rand(len(output.rewards) // group, group, generator=self.generator)
        first = torch.arange(0, len(output.rewards), group)[:, None]
        return output.reordered((first + draws.argsort(1)).flatten())
