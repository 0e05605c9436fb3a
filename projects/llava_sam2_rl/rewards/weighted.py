"""Several rewards as one: a weighted mean, times factors."""

from __future__ import annotations

from collections.abc import Sequence
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
    as_column,
    needs_of,
    scores_of,
)

#: The caption reward: 0.25 METEOR + 0.75 judge.
CAPTION_REWARDS: tuple[dict[str, Any], ...] = (
    {'type': 'MeteorReward', 'weight': 0.25},
    {'type': 'LLMJudgeReward', 'weight': 0.75},
)


@REWARDS.register_module()
class WeightedRewards(CompositeReward):
    """``sum(weight * reward) / sum(weight)`` over the rewards that could score, times the factors.

    Where a reward declines (``None``), the other weights are renormalised, so the result keeps its
    scale. Where all weighted rewards decline, or a factor does (leaving it out would favour that
    completion over its group), the result is ``None``.

    Args:
        rewards: One config per added term: what ``REWARDS`` builds, plus ``weight`` (>= 0, default
            1) and ``name`` (default the reward's own; what its logs are called). A weight of 0
            logs the reward without counting it. Defaults to ``None``: 0.25 METEOR + 0.75 judge,
            the judge with its defaults.
        factors: Configs of multiplied terms, e.g. ``dict(type='LengthReward', max_words=40)``.
            Defaults to none.

    Raises:
        ValueError: No term with a positive weight, a negative weight, or two terms of one name.
    """

    name = 'weighted'

    def __init__(
        self,
        rewards: Sequence[dict[str, Any]] | None = None,
        factors: Sequence[dict[str, Any]] = (),
    ) -> None:
        terms = [dict(config) for config in (CAPTION_REWARDS if rewards is None else rewards)]
        products = [dict(config) for config in factors]
        self.reward_weights = [float(config.pop('weight', 1.0)) for config in terms]
        names = [config.pop('name', None) for config in (*terms, *products)]
        self.reward_funcs: list[Reward] = [REWARDS.build(config) for config in (*terms, *products)]
        self.names = tuple(
            name or func.name for name, func in zip(names, self.reward_funcs, strict=True)
        )
        self.needs, self.parts = needs_of(*self.reward_funcs), self.reward_funcs
        if any(weight < 0 for weight in self.reward_weights) or sum(self.reward_weights) <= 0:
            raise ValueError(
                f'reward weights {self.reward_weights} must not be negative, and one must be '
                'positive; a penalty is a reward that returns negative numbers'
            )
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(
                f'two rewards share the name {", ".join(twice)}: their logs would overwrite each '
                "other; put name='...' into one's config"
            )

    def score(self, rollouts: RolloutBatch, started: Started = NOTHING_STARTED) -> RewardOutput:
        """The weighted reward with its parts.

        Args:
            rollouts: N rollouts.
            started: Terms that were started. Defaults to none.

        Returns:
            Rewards ``(N,)`` and all K terms ``(N, K)``, weighted ones first, then the factors.
        """
        columns = [
            as_column(name, scores_of(func, rollouts, started), rollouts)
            for name, func in zip(self.names, self.reward_funcs, strict=True)
        ]
        per_func = torch.stack(columns, dim=1)
        count = len(self.reward_weights)
        terms, factors = per_func[:, :count], per_func[:, count:]
        scorable = ~terms.isnan()
        weights = torch.tensor(self.reward_weights) * scorable
        # No weight left gives 0 / 0 = NaN: unscorable.
        rewards = (weights * terms.nan_to_num(0.0)).sum(1) / weights.sum(1)
        factor = factors.prod(1)
        # What is only logged is no term.
        counted = [k for k, weight in enumerate(self.reward_weights) if weight > 0]
        return RewardOutput(
            rewards * factor,
            per_func,
            self.names,
            terms=terms[:, counted] * factor[:, None],
            weights=tuple(self.reward_weights[k] for k in counted),
        )
