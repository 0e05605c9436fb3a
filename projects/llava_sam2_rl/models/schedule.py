"""What changes in the course of training: weights of the directions, which samples come first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmengine.logging import MessageHub


@dataclass(frozen=True)
class TaskWeight:
    """Options of a direction, or of the conversations.

    Args:
        weight: Weight of its losses; 0 turns it off. Defaults to 1.0.

    Raises:
        ValueError: ``weight`` is negative.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f'a weight must not be negative, got {self.weight}')


@dataclass(frozen=True)
class AdaptiveWeights:
    """More weight for the direction that is further from its goal.

    With recent mean rewards ``r1, r2`` (of at most 1) and weights ``w1, w2`` the distances are
    ``d = max(1 - r, 0)``, and direction i weighs ``w_i * 2 d_i / (d1 + d2)``, kept within
    ``[w_i / limit, w_i * limit]``. Equal rewards leave the weights as they are.

    Args:
        window: Steps that rewards are averaged over. Defaults to 50.
        limit: Largest factor between a weight and the given one, > 1. Defaults to 3.0.

    Raises:
        ValueError: An option is out of range.
    """

    window: int = 50
    limit: float = 3.0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f'adaptive_weights.window must be at least 1, got {self.window}')
        if not self.limit > 1:
            raise ValueError(f'adaptive_weights.limit must exceed 1, got {self.limit}')

    def apply(self, weights: Sequence[float], rewards: Sequence[float]) -> tuple[float, float]:
        """The two weights for the given ones and the recent mean rewards."""
        distances = [max(1.0 - reward, 0.0) for reward in rewards]
        total = sum(distances)
        factors = [2 * d / total if total > 0 else 1.0 for d in distances]
        first, second = (
            weight * min(max(factor, 1 / self.limit), self.limit)
            for weight, factor in zip(weights, factors, strict=True)
        )
        return first, second


@dataclass(frozen=True)
class Curriculum:
    """Easy samples first.

    The bound moves linearly from ``start`` to ``end`` over ``steps`` iterations. A batch leaves out
    the samples beyond it; the easiest one always stays.

    Args:
        by: ``'region_size'``: the bound is the smallest share of the image, falling.
            ``'expression_length'``: the largest number of words of the reference caption, rising;
            samples without a caption always stay.
        start: Bound at the first iteration.
        end: Bound from iteration ``steps`` on.
        steps: Iterations until then.

    Raises:
        ValueError: An option is unknown, or the bound moves towards fewer samples.
    """

    by: str
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.by not in ('region_size', 'expression_length'):
            raise ValueError(
                f"curriculum.by={self.by!r} is unknown: use 'region_size' or 'expression_length'"
            )
        if self.steps < 1:
            raise ValueError(f'curriculum.steps must be at least 1, got {self.steps}')
        rises = self.by == 'expression_length'
        if (self.end < self.start) if rises else (self.end > self.start):
            raise ValueError(
                f'curriculum by {self.by}: the bound must {"rise" if rises else "fall"}, got start '
                f'{self.start} and end {self.end}'
            )

    def bound(self, iteration: int) -> float:
        """The bound at an iteration, counted from 0."""
        return self.start + (self.end - self.start) * min(iteration / self.steps, 1.0)

    def choose(
        self,
        samples: Sequence[int],
        sizes: Sequence[float],
        captions: Sequence[str | None],
        iteration: int,
    ) -> list[int]:
        """The samples that take part.

        Args:
            samples: N indices, at least one.
            sizes: N shares of the image that the regions cover.
            captions: N reference captions, ``None`` where there is none.
            iteration: Of the runner.
        """
        bound = self.bound(iteration)
        if self.by == 'region_size':
            excess = [bound - size for size in sizes]
        else:
            excess = [
                len(caption.split()) - bound if caption else float('-inf') for caption in captions
            ]
        chosen = [sample for sample, e in zip(samples, excess, strict=True) if e <= 0]
        return chosen or [samples[min(range(len(excess)), key=excess.__getitem__)]]


@dataclass(frozen=True)
class GeometricSchedule:
    """A number that goes geometrically from one value to another: ``GumbelObjective.tau``.

    Args:
        start: Value at the first iteration, > 0.
        end: Value from iteration ``steps`` on, > 0.
        steps: Iterations until then. Defaults to 0: always ``end``.

    Raises:
        ValueError: A value is not positive, or ``steps`` is 0 and the two values differ.
    """

    start: float
    end: float
    steps: int = 0

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0):
            raise ValueError(f'start and end must be positive, got {self.start} and {self.end}')
        if self.steps < 0 or (self.steps == 0 and self.start != self.end):
            raise ValueError(f'steps must be at least 1, got {self.steps}')

    def at(self, iteration: int) -> float:
        """The value at an iteration, counted from 0."""
        share = min(1.0, iteration / self.steps) if self.steps else 1.0
        return self.start * (self.end / self.start) ** share


def current_iteration() -> int:
    """The runner's iteration, so that a schedule goes on after a resume; 0 without a runner."""
    hub = MessageHub.get_current_instance()
    return hub.get_info('iter') if 'iter' in hub.runtime_info else 0
