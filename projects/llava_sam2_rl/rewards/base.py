"""What a reward reads, what it gives back, and how a reward's answers become tensors."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from mmengine.logging import print_log
from torch import Tensor

from projects.llava_sam2_rl.registry import nearest
from projects.llava_sam2_rl.rewards.pending import PendingScores

Direction = Literal['mask_to_caption', 'caption_to_mask']

#: Of rewards that were started, by the `id` of the reward.
Started = Mapping[int, PendingScores]
NOTHING_STARTED: Started = {}


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """N = B*G finished rollouts, the G of a prompt side by side; every list has N entries.

    In ``mask_to_caption`` the completions are the policy's captions and the predicted masks the
    teacher's reading of them; in ``caption_to_mask`` the predicted masks are the policy's and the
    completions the teacher's reading of those. A reward needs not know which: the completion is
    scored against the reference caption, the predicted mask against the true one.

    What costs a pass of a model is there only where a reward names it in its ``needs`` (see
    :func:`needs_of`); a reward takes it by `required`.

    Args:
        completions: Caption text, cleaned of markers and special tokens; may be empty. ``None`` in
            ``caption_to_mask`` where no reward needs it: nothing was written.
        num_generations: G.
        direction: ``'mask_to_caption'`` or ``'caption_to_mask'``.
        prompts: The text that was asked, or ``None`` where nobody reads it.
        references: Reference caption of each region; ``None`` entries where there is none.
        gt_masks: ``(R, H, W)`` bool each, the regions the caption speaks of, in the frame of the
            return trip; R = 0, or masks without a pixel, where it speaks of nothing in the image.
        pred_mask_logits: ``(P, H, W)`` float each, a mask for each ``[SEG]``, at the resolution of
            ``gt_masks``; positive = inside. Rewards that threshold do so at 0.
        gt_tracks: T × ``(R, H, W)`` bool each, the regions in every frame of a clip through which
            the masks were carried; T = 1 for an image. ``None`` where they were not: then
            ``gt_masks`` is all that counts.
        pred_tracks: The same of the predicted masks, cut at 0.
        sample_ids: Names of the records, for messages and reports.
        completion_lengths: Tokens per completion, through the first stop.
        truncated: Whether the completion hit the length limit without a stop.
        caption_logps: ``(T,)`` float each: the teacher's log-prob of each token of the caption,
            the end included, given the image and the mask. In ``caption_to_mask`` that is the
            reference caption, its first ``max_new_tokens`` tokens, given the predicted mask; in
            ``mask_to_caption`` the completion given the true mask. ``None`` entries where there is
            no caption, or the mask has no cell.
        caption_logps_no_mask: ``(T,)`` each: the same where the region is the whole image, which
            says nothing of what in it is meant. ``None`` entries where there is no caption.
        caption_logps_other_regions: ``(K, T)`` each, K >= 1: the same given each of the image's
            other regions; where it has none, as in ``caption_logps_no_mask``. ``None`` entries
            where there is no caption.

    Raises:
        ValueError: Lists of different lengths, or none; N is no multiple of G; or a mask has the
            wrong shape or dtype.
    """

    completions: Sequence[str] | None
    num_generations: int
    direction: Direction
    prompts: Sequence[str] | None = None
    references: Sequence[str | None] | None = None
    gt_masks: Sequence[Tensor] | None = None
    pred_mask_logits: Sequence[Tensor] | None = None
    gt_tracks: Sequence[Sequence[Tensor]] | None = None
    pred_tracks: Sequence[Sequence[Tensor]] | None = None
    sample_ids: Sequence[str] | None = None
    completion_lengths: Sequence[int] | None = None
    truncated: Sequence[bool] | None = None
    caption_logps: Sequence[Tensor | None] | None = None
    caption_logps_no_mask: Sequence[Tensor | None] | None = None
    caption_logps_other_regions: Sequence[Tensor | None] | None = None

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(
                f'direction={self.direction!r} is unknown: use one of '
                f'{", ".join(get_args(Direction))}'
            )
        lists = self._lists()
        if not lists:
            raise ValueError('a RolloutBatch needs a list at least, of completions or of masks')
        first, count = next((name, len(value)) for name, value in lists.items())
        if self.num_generations < 1 or count % self.num_generations:
            raise ValueError(
                f'{count} {first} do not divide into groups of num_generations='
                f'{self.num_generations}'
            )
        for name, value in lists.items():
            if len(value) != count:
                raise ValueError(f'{name} has {len(value)} entries for {count} {first}: one each')
        for index in range(count):
            self._check_masks(index)
        if (self.gt_tracks is None) != (self.pred_tracks is None):
            raise ValueError('gt_tracks and pred_tracks come together or not at all')
        for index, (gt, pred) in enumerate(zip(self.gt_tracks or (), self.pred_tracks or ())):
            if len(gt) != len(pred) or not gt:
                raise ValueError(
                    f'{self.name(index)}: {len(pred)} predicted masks for {len(gt)} frames of a '
                    'clip: one each, and a frame at least'
                )

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

    def _lists(self) -> dict[str, Sequence[Any]]:
        """The lists that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if name not in ('num_generations', 'direction') and value is not None
        }

    def __len__(self) -> int:
        return len(next(iter(self._lists().values())))

    def required(self, name: str, reward: object) -> Sequence[Any]:
        """A field that a reward cannot do without.

        Args:
            name: Of the field.
            reward: Who asks, for the message.

        Raises:
            ValueError: The batch does not have it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f'{type(reward).__name__} needs {name}, the batch has none. It is filled in for '
                f'rewards whose attribute `needs` names it; so must that of a reward around it'
            )
        return value

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

    ``needs``, an attribute it may have, names the fields of `RolloutBatch` that it reads and that
    cost a pass of a model, see :func:`needs_of`. ``start``, a method it may have, takes a
    `RolloutBatch` of completions and reference captions alone and returns `PendingScores` at once:
    what it waits for is then under way while the step goes on, see :func:`start`.
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
        terms: ``(N, M)`` float32, what ``rewards`` is the weighted mean of, NaN where a term
            declined. ``None``: ``rewards`` itself is the one term.
        weights: The M weights.
    """

    rewards: Tensor
    rewards_per_func: Tensor
    names: tuple[str, ...]
    failure: str | None = None
    terms: Tensor | None = None
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        shape, expected = tuple(self.rewards_per_func.shape), (len(self.rewards), len(self.names))
        if self.rewards.ndim != 1 or shape != expected:
            raise ValueError(
                f'rewards_per_func is {shape}, expected {expected}: rewards (N,) by names (K,)'
            )
        shape, expected = tuple(self.addends.shape), (len(self.rewards), len(self.weights))
        if shape != expected:
            raise ValueError(f'terms is {shape}, expected {expected}: rewards (N,) by weights (M,)')

    @property
    def addends(self) -> Tensor:
        """``(N, M)``: ``terms``, or the rewards where they are made of nothing."""
        return self.rewards[:, None] if self.terms is None else self.terms

    def reordered(self, order: Tensor) -> RewardOutput:
        """The same rewards given to other rollouts, ``(N,)`` int64; the parts stay."""
        terms = None if self.terms is None else self.terms[order]
        return replace(self, rewards=self.rewards[order], terms=terms)

    def overridden(self, values: Mapping[int, float]) -> RewardOutput:
        """Some rollouts with rewards of another origin; the parts stay."""
        rewards, terms = self.rewards.clone(), self.terms
        terms = None if terms is None else terms.clone()
        for n, value in values.items():
            rewards[n] = value
            if terms is not None:
                terms[n] = value
        return replace(self, rewards=rewards, terms=terms)


class CompositeReward(ABC):
    """Base of rewards that are made of others and report these beside their own number."""

    name: str
    #: Names of the parts, in the order of ``rewards_per_func``.
    names: tuple[str, ...]
    #: Fields of `RolloutBatch` that the parts need.
    needs: tuple[str, ...] = ('completions',)
    #: Those that may be started before they are asked, see :func:`start`.
    parts: Sequence[Reward] = ()

    @abstractmethod
    def score(self, rollouts: RolloutBatch, started: Started = NOTHING_STARTED) -> RewardOutput:
        """Rewards ``(N,)`` with their K parts ``(N, K)``.

        Args:
            rollouts: N rollouts.
            started: Which of `parts` were, for :func:`scores_of`; given to a reward with `parts`
                alone.
        """

    def __call__(
        self, rollouts: RolloutBatch, started: Started = NOTHING_STARTED
    ) -> list[float | None]:
        """One number per rollout, ``None`` where it could not be scored."""
        output = self.score(rollouts, started) if started else self.score(rollouts)
        return [None if math.isnan(value) else value for value in output.rewards.tolist()]


def needs_of(*rewards: Reward) -> tuple[str, ...]:
    """What rewards read of a `RolloutBatch` that costs a pass of a model.

    A reward says so by an attribute ``needs``, names of fields: ``()`` for one that looks at masks
    and references alone. One without it is taken to read ``completions``.

    Args:
        rewards: Any number of rewards.

    Returns:
        The names, sorted, without repetition.

    Raises:
        ValueError: `RolloutBatch` has no such field; the message names the nearest.
    """
    names = {name for reward in rewards for name in getattr(reward, 'needs', ('completions',))}
    valid = [field.name for field in fields(RolloutBatch)]
    for name in sorted(names - set(valid)):
        raise ValueError(
            f'a reward needs {name!r}, no field of RolloutBatch: {nearest(name, valid)}'
        )
    return tuple(sorted(names))


def part_names(reward: Reward) -> tuple[str, ...]:
    """Names of a reward's parts: its own alone, unless it is a :class:`CompositeReward`."""
    return reward.names if isinstance(reward, CompositeReward) else (reward.name,)


def can_start(reward: Reward) -> bool:
    """Whether the reward, or a part of it, can be started before it is asked."""
    return hasattr(reward, 'start') or any(map(can_start, getattr(reward, 'parts', ())))


def start(reward: Reward, rollouts: RolloutBatch) -> Started:
    """Starts what a reward waits for, and waits for nothing.

    Args:
        reward: A reward; the `parts` of a :class:`CompositeReward` are started.
        rollouts: Completions, and reference captions; masks and likelihoods need not be there yet.

    Returns:
        For :func:`score`, which is to be given the same completions and references.
    """
    if hasattr(reward, 'start'):
        return {id(reward): reward.start(rollouts)}
    parts = getattr(reward, 'parts', ())
    return {key: scores for part in parts for key, scores in start(part, rollouts).items()}


def scores_of(reward: Reward, rollouts: RolloutBatch, started: Started) -> list[float | None]:
    """A part's scores: those that were started, else by calling it."""
    if id(reward) in started:
        return started[id(reward)].result()
    if started and isinstance(reward, CompositeReward):
        return reward(rollouts, started)
    return reward(rollouts)


def score(
    reward: Reward, rollouts: RolloutBatch, started: Started = NOTHING_STARTED
) -> RewardOutput:
    """Calls a reward of any kind for a training step and checks what it gives back.

    A reward that gives up (`RewardUnavailableError`) leaves the rollouts unscorable and says why in
    ``failure``. Raised in the middle of a step, the error would leave other ranks waiting and
    nothing could be saved; ``RewardFailureHook`` saves and stops all ranks after the step.

    Args:
        reward: A reward; a :class:`CompositeReward` reports its parts.
        rollouts: N rollouts.
        started: What :func:`start` returned. Defaults to nothing.

    Returns:
        Rewards and parts as tensors on the CPU.

    Raises:
        ValueError: The reward broke its contract: wrong length, or a NaN or infinite score.
    """
    try:
        if isinstance(reward, CompositeReward):
            return reward.score(rollouts, started) if started else reward.score(rollouts)
        column = as_column(reward.name, scores_of(reward, rollouts, started), rollouts)
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
