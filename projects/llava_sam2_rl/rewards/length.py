"""A soft factor for captions outside a range of words."""

from __future__ import annotations

import math

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards.base import RolloutBatch


@REWARDS.register_module()
class LengthReward:
    """1 inside ``[min_words, max_words]``, ``exp(-excess / softness)`` for words beyond either end.

    Never flat outside the range, so that a caption that is far too long still gains by each word it
    drops. Meant as a factor of :class:`WeightedRewards`: judges pay half for a vague caption.

    Args:
        min_words: Fewest words without a loss. Defaults to 5.
        max_words: Most words without a loss. Defaults to 60.
        softness: Words of excess that cost the factor ``1/e``, > 0. Defaults to 10.
    """

    name = 'length'
    needs = ('completions',)

    def __init__(self, min_words: int = 5, max_words: int = 60, softness: float = 10.0) -> None:
        if not 0 <= min_words <= max_words:
            raise ValueError(
                f'min_words={min_words} and max_words={max_words} must satisfy 0 <= min <= max'
            )
        if softness <= 0:
            raise ValueError(f'softness must be positive, got {softness}')
        self.min_words = min_words
        self.max_words = max_words
        self.softness = softness

    def __call__(self, rollouts: RolloutBatch) -> list[float | None]:
        """A number in (0, 1] per completion; words are what white space separates."""
        return [self._score(len(text.split())) for text in rollouts.required('completions', self)]

    def _score(self, words: int) -> float:
        excess = max(self.min_words - words, words - self.max_words, 0)
        return math.exp(-excess / self.softness)
