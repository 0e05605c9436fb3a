"""What every objective is: rollouts without a gradient, then losses with one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.objectives.rollouts import Rollout
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.rewards.base import Direction
from projects.llava_sam2_rl.structures import MeanLoss

#: What the log keys of a direction start with.
LOG_PREFIX: dict[Direction, str] = {'mask_to_caption': 'loop1', 'caption_to_mask': 'loop2'}

#: Losses to be optimised and values to be logged, by log key (``loop1/…`` and ``loop2/…``).
LossesAndMetrics = tuple[dict[str, MeanLoss], dict[str, Tensor | float]]


class Objective(ABC):
    """What carries the learning signal.

    A training step calls `rollout` once, `synchronize` once, and `losses` once for each of
    ``num_iterations`` updates. A subclass implements `rollout` and `losses`.
    """

    #: Updates over the same rollouts (μ).
    num_iterations: int = 1
    #: Whether caption_to_mask's gradient is projected to not conflict with mask_to_caption's.
    gradient_surgery: bool = False
    #: Whether the language model is shown all frames of clips at once (`RegionBatch.clips`).
    reads_clips: bool = False
    #: Whether `last_rollouts` has rewards, which adaptive weights compare.
    has_rewards: bool = False

    def __init__(self) -> None:
        #: Directions that are trained.
        self.directions: frozenset[Direction] = frozenset(LOG_PREFIX)
        #: Longest caption in tokens.
        self.max_new_tokens = 64
        #: Whether the next step's rollouts will be drawn: then texts are written that no reward
        #: reads. Alike on all ranks.
        self.draw_rollouts = False
        #: Weights of the policy that the objective keeps for itself.
        self.references: list[EMATeacher] = []
        #: The scored rollouts of the last step by direction, for hooks; empty without rewards.
        self.last_rollouts: dict[Direction, Rollout] = {}

    def setup(
        self, policy: VideoLLaVASAMModel, directions: Collection[Direction], max_new_tokens: int
    ) -> None:
        """Called once when the policy is built, before any checkpoint is loaded.

        Args:
            policy: The network.
            directions: The directions that are trained.
            max_new_tokens: Longest caption in tokens.
        """
        self.directions = frozenset(directions)
        self.max_new_tokens = max_new_tokens

    @abstractmethod
    def rollout(
        self, policy: VideoLLaVASAMModel, teacher: EMATeacher, batch: RegionBatch
    ) -> dict[Direction, Rollout]:
        """Samples, makes the return trip and scores; runs without gradient.

        Args:
            policy: The network, with the policy's weights.
            teacher: Puts its weights into the network: ``with teacher.applied_to(policy): …``.
            batch: At least one region, no conversation.

        Returns:
            By direction; a direction with nothing to do is absent.
        """

    def synchronize(
        self, rollouts: dict[Direction, Rollout], device: torch.device
    ) -> dict[Direction, Rollout]:
        """Adds what the rollouts need of those of other ranks; called on every rank.

        Args:
            rollouts: Of this rank; empty where it has no region.
            device: Where collectives run.
        """
        return rollouts

    @abstractmethod
    def losses(
        self,
        policy: VideoLLaVASAMModel,
        batch: RegionBatch,
        rollouts: Mapping[Direction, Rollout],
    ) -> LossesAndMetrics:
        """The losses of one update over the rollouts, with gradient, and what is logged.

        Losses are not yet multiplied by the weights of their directions: the wrapper multiplies
        those whose log key starts with ``loop1/`` or ``loop2/``.

        Args:
            policy: The network.
            batch: The batch that `rollout` was given.
            rollouts: What `rollout` and `synchronize` returned.
        """


def with_prefix(direction: Direction, values: Mapping[str, object]) -> dict:
    """Values by log key: ``loop1/…`` or ``loop2/…`` before each name."""
    return {f'{LOG_PREFIX[direction]}/{name}': value for name, value in values.items()}


def check_objective(objective: object) -> Objective:
    """The objective, if it is one.

    Raises:
        TypeError: It is no `Objective`; the message names what it lacks.
    """
    if isinstance(objective, Objective):
        return objective
    parts = [name for name in vars(Objective) if not name.startswith('_')]
    lacking = [name for name in parts if not hasattr(objective, name)]
    raise TypeError(
        f'{type(objective).__name__} is no objective: derive it from '
        f'projects.llava_sam2_rl.models.objectives.Objective'
        + (f' (it lacks {", ".join(lacking)})' if lacking else '')
    )
