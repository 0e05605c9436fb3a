"""What a reward reads, what it gives back, and how a reward's answers become tensors."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from mmengine.logging import print_log
from torch import Tensor

Direction = Literal['mask_to_caption', 'caption_to_mask']


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """N = B*G finished rollouts, the G of a prompt side by side; every list has N entries.

    In ``mask_to_caption`` the completions are the policy's captions and the predicted masks the
    teacher's reading of them; in ``caption_to_mask`` the predicted masks are the policy's and the
    completions the teacher's reading of those. A reward needs not know which: the completion is
    scored against the reference caption, the predicted mask against the true one.

    Args:
        completions: Caption text, cleaned of markers and special tokens; may be empty.
        num_generations: G.
        direction: ``'mask_to_caption'`` or ``'caption_to_mask'``.
        prompts: The text that was asked, or ``None`` where nobody reads it.
        references: Reference caption of each region; ``None`` entries where there is none.
        gt_masks: ``(R, H, W)`` bool each, the regions the caption speaks of, in the frame of the
            return trip; R = 0, or masks without a pixel, where it speaks of nothing in the image.
        pred_mask_logits: ``(P, H, W)`` float each, a mask for each ``[SEG]``, at the resolution of
            ``gt_masks``; positive = inside. Rewards that threshold do so at 0.
        sample_ids: Names of the records, for messages and reports.
        completion_lengths: Tokens per completion, through the first stop.
        truncated: Whether the completion hit the length limit without a stop.

    Raises:
        ValueError: A list has another length than ``completions``, N is no multiple of G, or a
            mask has the wrong shape or dtype.
    """

    completions: Sequence[str]
    num_generations: int
    direction: Direction
    prompts: Sequence[str] | None = None
    references: Sequence[str | None] | None = None
    gt_masks: Sequence[Tensor] | None = None
    pred_mask_logits: Sequence[Tensor] | None = None
    sample_ids: Sequence[str] | None = None
    completion_lengths: Sequence[int] | None = None
    truncated: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(
                f'direction={self.direction!r} is unknown: use one of '
                f'{", ".join(get_args(Direction))}'
            )
        count = len(self.completions)
        if self.num_generations < 1 or count % self.num_generations:
            raise ValueError(
                f'{count} completions do not divide into groups of num_generations='
                f'{self.num_generations}'
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ('num_generations', 'direction') or value is None:
                continue
            if len(value) != count:
                raise ValueError(
                    f'{field.name} has {len(value)} entries for {count} completions: one each'
                )
        for index in range(count):
            self._check_masks(index)

    def _check_masks(self, index: int) -> None:
        gt = None if self.gt_masks is None else self.gt_masks[index]
        pred = None if self.pred_mask_logits is None else self.pred_mask_logits[index]
        if gt is not None and (gt.ndim != 3 or gt.dtype != torch.bool):
            raise ValueError(
                f'{self.name(index)}: gt_masks must be (R, H, W) bool, got {tuple(gt.shape)} '
                f'{gt.dtype}'
            )
        if pred is not None and (pred.ndim != 3 or not pred.is_floating_point()):
            raise ValueError(
                f'{self.name(index)}: pred_mask_logits must be (P, H, W) float, got '
                f'{tuple(pred.shape)} {pred.dtype}'
            )
        if gt is not None and pred is not None and gt.shape[1:] != pred.shape[1:]:
            raise ValueError(
                f'{self.name(index)}: pred_mask_logits is {tuple(pred.shape)}, gt_masks '
                f'{tuple(gt.shape)}: resize the logits to the original image first'
            )

    def __len__(self) -> int:
        return len(self.completions)

    def name(self, index: int) -> str:
        """What messages call rollout ``index``."""
        if self.sample_ids is None:
            return f'rollout {index}'
        return f'{self.sample_ids[index]} (rollout {index})'


class RewardUnavailableError(RuntimeError):
    """A reward gave up for good: what it asks is down. The run has to stop, and the reason."""


@runtime_checkable
class Reward(Protocol):
    """A callable with a name: one number per completion, ``None`` where it declines.

    ``None`` means "cannot be scored" (the judge timed out, there is no reference caption): the
    completion then takes no part in its group's statistics. It is never a stand-in for 0.
    """

    name: str

    def __call__(self, rollouts: RolloutBatch) -> list[float | None]:
        """Scores, in the order of ``rollouts.completions``."""
        ...


@dataclass(frozen=True, eq=False)
class RewardOutput:
    """Rewards of N rollouts with the parts they are made of.

    Args:
        rewards: ``(N,)`` float32, NaN = unscorable.
        rewards_per_func: ``(N, K)`` float32, NaN where a reward declined.
        names: The K rewards' names, in the order of the columns.
        failure: Why the reward gave up for good; all scores are NaN then, and the run must stop.
    """

    rewards: Tensor
    rewards_per_func: Tensor
    names: tuple[str, ...]
    failure: str | None = None

    def __post_init__(self) -> None:
        shape, expected = tuple(self.rewards_per_func.shape), (len(self.rewards), len(self.names))
        if self.rewards.ndim != 1 or shape != expected:
            raise ValueError(
                f'rewards_per_func is {shape}, expected {expected}: rewards (N,) by names (K,)'
            )


class CompositeReward(ABC):
    """Base of rewards that are made of others and report these beside their own number."""

    name: str
    #: Names of the parts, in the order of ``rewards_per_func``.
    names: tuple[str, ...]

    @abstractmethod
    def score(self, rollouts: RolloutBatch) -> RewardOutput:
        """Rewards ``(N,)`` with their K parts ``(N, K)``."""

    def __call__(self, rollouts: RolloutBatch) -> list[float | None]:
        """One number per rollout, ``None`` where it could not be scored."""
        rewards = self.score(rollouts).rewards.tolist()
        return [None if math.isnan(value) else value for value in rewards]


def part_names(reward: Reward) -> tuple[str, ...]:
    """Names of a reward's parts: its own alone, unless it is a :class:`CompositeReward`."""
    return reward.names if isinstance(reward, CompositeReward) else (reward.name,)


def score(reward: Reward, rollouts: RolloutBatch) -> RewardOutput:
    """Calls a reward of any kind for a training step and checks what it gives back.

    A reward that gives up (`RewardUnavailableError`) leaves the rollouts unscorable and says why in
    ``failure``. Raised in the middle of a step, the error would leave other ranks waiting and
    nothing could be saved; ``RewardFailureHook`` saves and stops all ranks after the step.

    Args:
        reward: A reward; a :class:`CompositeReward` reports its parts.
        rollouts: N rollouts.

    Returns:
        Rewards and parts as tensors on the CPU.

    Raises:
        ValueError: The reward broke its contract: wrong length, or a NaN or infinite score.
    """
    try:
        if isinstance(reward, CompositeReward):
            return reward.score(rollouts)
        column = as_column(reward.name, reward(rollouts), rollouts)
        return RewardOutput(column, column[:, None], (reward.name,))
    except RewardUnavailableError as error:
        print_log(f'{reward.name}: {error}', logger='current', level=logging.ERROR)
        names = part_names(reward)
        nothing = torch.full((len(rollouts), len(names)), math.nan)
        return RewardOutput(nothing[:, 0], nothing, names, failure=str(error))


def as_column(name: str, values: Sequence[float | None], rollouts: RolloutBatch) -> Tensor:
    """A reward's list as an ``(N,)`` float32 tensor with NaN for ``None``.

    Raises:
        ValueError: Not one value per completion, or one that is NaN or infinite: a reward that
            cannot score says so by ``None``.
    """
    if len(values) != len(rollouts):
        raise ValueError(
            f'reward {name!r} returned {len(values)} values for {len(rollouts)} completions'
        )
    for index, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f'reward {name!r} returned {value} for {rollouts.name(index)}; what cannot be '
                'scored is None'
            )
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float32)
