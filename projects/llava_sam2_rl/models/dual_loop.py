"""`DualLoopModel`: describing a region and finding a described region, trained together."""

from __future__ import annotations

import inspect
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from projects.llava_sam2_rl.engine.distributed import (
    ReducedLosses,
    drop_gradients,
    mean_of_logged,
    optim_context,
    reduce_losses,
    zero_loss_over,
)
from projects.llava_sam2_rl.engine.split_weights import WholeWeights
from projects.llava_sam2_rl.engine.timing import phase
from projects.llava_sam2_rl.models.batch import RegionBatch, encode_batch
from projects.llava_sam2_rl.models.captioning import conversation_loss
from projects.llava_sam2_rl.models.cycle import run_cycles
from projects.llava_sam2_rl.models.generation import no_gradient
from projects.llava_sam2_rl.models.gradient_surgery import apply_gradient_surgery
from projects.llava_sam2_rl.models.objectives.base import (
    LOG_PREFIX,
    LossesAndMetrics,
    Objective,
    check_objective,
)
from projects.llava_sam2_rl.models.objectives.rollouts import Rollout
from projects.llava_sam2_rl.models.sa2va.layout import upgrade_training_checkpoint
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.schedule import (
    AdaptiveWeights,
    Curriculum,
    TaskWeight,
    current_iteration,
)
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.registry import MODELS, OBJECTIVES, from_options, nearest
from projects.llava_sam2_rl.rewards.base import Direction
from projects.llava_sam2_rl.structures import MeanLoss, RegionMeta
from projects.llava_sam2_rl.utils.errors import CheckpointError


@MODELS.register_module()
class DualLoopModel(BaseModel):
    """Policy, teacher and objective around one batch.

    Args:
        policy: The trained model or its config.
        objective: What carries the learning signal, or its config (`SFTObjective`, …).
        teacher: Options of `EMATeacher`: ``dict(decay=…)``. Defaults to a decay of 0.999.
        mask_to_caption: ``dict(weight=…)`` of the first direction; 0 turns it off. Defaults to 1.0.
        caption_to_mask: ``dict(weight=…)`` of the second direction; 0 turns it off. Defaults to
            1.0.
        chat: ``dict(weight=…)`` of the cross-entropy of ordinary conversations, for data that has
            some. Defaults to 1.0.
        adaptive_weights: Options of `AdaptiveWeights`. Defaults to None: the weights stay as given.
        curriculum: Options of `Curriculum`. Defaults to None: all samples from the start.
        max_new_tokens: Longest caption in tokens. Defaults to 64.
        predict_with: Weights that `predict` uses: ``'policy'`` or ``'teacher'``. Defaults to
            ``'policy'``.
        max_skipped_steps: Steps with a loss that is not finite that are skipped before the run
            stops. Defaults to 10.
        gather_for_rollout: Where ZeRO-3 keeps the language model in parts: put it together for the
            rollout, or a batch of validation, and take it apart after it (True), or let each token
            gather it layer by layer (False). Defaults to None: the run puts it together where the
            memory model has room for it on every GPU; without GPUs, in each rank's share of the
            machine's memory.
        data_preprocessor: See mmengine's ``BaseModel``. Defaults to its own, which does not wait
            for copies out of pinned memory.
    """

    def __init__(
        self,
        policy: VideoLLaVASAMModel | dict,
        objective: Objective | dict,
        teacher: dict | None = None,
        mask_to_caption: dict | None = None,
        caption_to_mask: dict | None = None,
        chat: dict | None = None,
        adaptive_weights: dict | None = None,
        curriculum: dict | None = None,
        max_new_tokens: int = 64,
        predict_with: str = 'policy',
        max_skipped_steps: int = 10,
        gather_for_rollout: bool | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        **unknown: Any,
    ):
        super().__init__(
            data_preprocessor=data_preprocessor
            or dict(type='BaseDataPreprocessor', non_blocking=True)
        )
        # The runner builds this class before anything has imported the registries' own check.
        for key in unknown:
            valid = list(inspect.signature(DualLoopModel).parameters)
            raise TypeError(f'DualLoopModel has no option {key!r}: {nearest(key, valid)}')
        if predict_with not in ('policy', 'teacher'):
            raise ValueError(f"predict_with must be 'policy' or 'teacher', got {predict_with!r}")
        #: As given; 0 = off.
        self.initial_weights: dict[Direction, float] = {
            'mask_to_caption': _weight('mask_to_caption', mask_to_caption),
            'caption_to_mask': _weight('caption_to_mask', caption_to_mask),
        }
        #: Of this step.
        self.weights = dict(self.initial_weights)
        if not any(self.weights.values()):
            raise ValueError('both directions have weight 0: there is nothing to train')
        self.chat_weight = _weight('chat', chat)
        self.adaptive_weights = self.curriculum = None
        if adaptive_weights is not None:
            self.adaptive_weights = from_options(
                AdaptiveWeights, 'adaptive_weights', adaptive_weights
            )
        if curriculum is not None:
            self.curriculum = from_options(Curriculum, 'curriculum', curriculum)
        self.policy: VideoLLaVASAMModel = (
            MODELS.build(policy) if isinstance(policy, dict) else policy
        )
        if self.policy.tokenizer is None:
            raise ValueError('the policy needs a tokenizer: its prompts are text')
        #: Not a module: its float32 shadows must not be cast, nor saved as the policy's weights.
        self.teacher = EMATeacher(self.policy, **(teacher or {}))
        self.objective: Objective = check_objective(
            OBJECTIVES.build(objective) if isinstance(objective, dict) else objective
        )
        if self.adaptive_weights is not None and not self.objective.has_rewards:
            raise ValueError(
                f'adaptive_weights compares rewards, {type(self.objective).__name__} has none'
            )
        directions = [direction for direction, weight in self.weights.items() if weight > 0]
        self.objective.setup(self.policy, directions, max_new_tokens)
        self.max_new_tokens = max_new_tokens
        self.predict_with = predict_with
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        self.gather_for_rollout = gather_for_rollout
        self.register_load_state_dict_post_hook(_expect_trainable_only)

    def init_weights(self) -> None:
        """Nothing, see `VideoLLaVASAMModel.init_weights`."""
        self._is_init = True

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Trainable tensors only: all else is in the folder the policy was built from."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get('prefix', '')
        trainable = {prefix + name for name, p in self.named_parameters() if p.requires_grad}
        return OrderedDict((key, value) for key, value in state.items() if key in trainable)

    def upgrade_checkpoint(self, checkpoint: dict, path: Any, *, resume: bool) -> None:
        """Before a training checkpoint is looked at; see `upgrade_training_checkpoint`."""
        upgrade_training_checkpoint(self.policy, checkpoint, path, resume=resume)

    def update_teacher(self) -> None:
        """Moves the teacher towards the policy; to be called once an optimizer step."""
        with phase('teacher'):
            self.teacher.update(self.policy)

    @contextmanager
    def teacher_applied(self) -> Iterator[None]:
        """Inside the scope the policy computes with the teacher's weights."""
        with self.teacher.applied_to(self.policy):
            yield

    def use_weights(self, weights: WholeWeights) -> None:
        """Tells policy, teacher and reference who puts weights together that lie in parts.

        Raises:
            ValueError: Some have to stay whole, see `Sa2VANetwork.use_weights`.
        """
        self.policy.use_weights(weights)
        for kept in (self.teacher, *self.objective.references):
            kept.use_weights(self.policy, weights)

    # ------------------------------------------------------------ the training step

    def train_step(
        self, data: Any, optim_wrapper: OptimWrapper, wrapper: Any = None
    ) -> dict[str, Any]:
        """One batch: one update, or ``num_iterations`` updates over the same rollouts.

        The numbers are those of the method page (docs/method.md).

        Args:
            data: What the data loader gives.
            optim_wrapper: mmengine's.
            wrapper: What forward passes with a gradient go through (DDP, a DeepSpeed engine).
                Defaults to this model itself.

        Returns:
            The losses over all ranks, for the log.

        Raises:
            RuntimeError: More than ``max_skipped_steps`` steps were skipped.
        """
        wrapper = self if wrapper is None else wrapper
        with optim_context(optim_wrapper, wrapper):
            data = self.data_preprocessor(data, True)
            names = [meta.name for meta in data['data_samples']]
            batch = self.encode(data['data'], names)  # 1. the frozen encoders
            rollouts = self.rollout(batch)  # 2. sample, return trip, score
        for _ in range(self.objective.num_iterations):
            with optim_context(optim_wrapper, wrapper), phase('forward'):
                losses, metrics = wrapper(batch, rollouts, mode='objective')  # 3. with gradients
            with phase('exchange'):
                self.policy.weights.together()
                reduced = reduce_losses(losses, metrics)  # 4. one exchange between ranks
            self._update(losses, reduced, optim_wrapper)  # 5. backward, optimizer
        return {'loss': sum(reduced.losses.values()), **reduced.losses}

    def encode(self, data: Mapping[str, Any], names: Sequence[str] | None = None) -> RegionBatch:
        """Step 1: encodes every image of the batch once; the curriculum leaves samples out."""
        batch = encode_batch(self.policy, data, names, self.objective.reads_clips)
        if self.curriculum is None or not batch.regions:
            return batch
        chosen = self.curriculum.choose(
            batch.regions,
            [float(batch.gt_masks[i].float().mean()) for i in batch.regions],
            [batch.captions[i] for i in batch.regions],
            current_iteration(),
        )
        return batch.subset(sorted([*chosen, *batch.chats]))

    def rollout(self, batch: RegionBatch) -> dict[Direction, Rollout]:
        """Step 2: the objective's rollouts for the regions of a batch, without gradient."""
        weights = self.policy.weights
        weights.together()
        self._adapt_weights()
        rollouts: dict[Direction, Rollout] = {}
        if batch.regions:
            with phase('rollout'), no_gradient(), self._for_decoding():
                rollouts = self.objective.rollout(
                    self.policy, self.teacher, batch.subset(batch.regions)
                )
        # Also on a rank without regions: the others wait for its part.
        weights.together()
        return self.objective.synchronize(rollouts, self.policy.device)

    def losses(self, batch: RegionBatch, rollouts: Mapping[Direction, Rollout]) -> LossesAndMetrics:
        """Step 3: weighted losses of the objective and of the conversations, and the metrics."""
        losses: dict[str, MeanLoss] = {}
        metrics: dict[str, Tensor | float] = {}
        if batch.regions:
            found, metrics = self.objective.losses(
                self.policy, batch.subset(batch.regions), rollouts
            )
            weights = {LOG_PREFIX[d]: weight for d, weight in self.weights.items()}
            losses = {
                key: loss.weighted(weights.get(key.split('/')[0], 1.0))
                for key, loss in found.items()
            }
        if batch.chats and self.chat_weight > 0:
            loss = conversation_loss(self.policy, batch, batch.chats)
            losses['chat/caption_loss'] = loss.weighted(self.chat_weight)
        if self.adaptive_weights is not None:
            for direction, weight in self.weights.items():
                metrics[f'{LOG_PREFIX[direction]}/weight'] = weight
        if self.curriculum is not None:
            metrics['curriculum/samples'] = float(len(batch.regions))
        return losses, metrics

    def _update(
        self, losses: Mapping[str, MeanLoss], reduced: ReducedLosses, optim_wrapper: OptimWrapper
    ) -> None:
        """Step 5: backward and update; skipped where a loss is not finite on any rank."""
        scaled = reduced.scale(losses)
        parameters = [p for p in self.parameters() if p.requires_grad]
        total = sum(scaled.values(), start=zero_loss_over(parameters, self.policy.device))
        if self.objective.gradient_surgery:
            total, cosine = apply_gradient_surgery(scaled, total, parameters)
            reduced.metrics['gradient_cosine'] = float(cosine)
        self._log(reduced)
        if not reduced.not_finite:
            with phase('optimizer'):
                optim_wrapper.update_params(total)
        else:
            drop_gradients(optim_wrapper)
            self._count_skipped(reduced.not_finite)

    # ----------------------------------------------------------------- forward

    def forward(self, data: Any, data_samples: Any = None, mode: str = 'loss') -> Any:
        """mmengine's entry.

        Args:
            data: What `sa2va_collate` made.
            data_samples: B `RegionMeta`.
            mode: ``'loss'``: dict of weighted losses; metrics go to the message hub.
                ``'predict'``: see `predict`. ``'objective'``: `losses` of a `RegionBatch` and its
                rollouts; `train_step` calls it, so that what is wrapped around the model sees one
                forward before each backward.
        """
        if mode == 'objective':
            return self.losses(data, data_samples)
        if mode == 'predict':
            return self.predict(data, data_samples)
        if mode != 'loss':
            raise ValueError(f"mode must be 'loss', 'objective' or 'predict', got {mode!r}")
        batch = self.encode(data, _names(data_samples))
        losses, metrics = self.losses(batch, self.rollout(batch))
        self.policy.weights.together()
        reduced = reduce_losses(losses, metrics)
        self._log(reduced)
        return reduced.scale(losses)

    @torch.no_grad()
    def predict(
        self, data: Mapping[str, Any], data_samples: Sequence[RegionMeta] | None = None
    ) -> list[dict[str, Any]]:
        """Both cycles of every sample, greedily; see `run_cycles`."""
        scope = self.teacher_applied() if self.predict_with == 'teacher' else nullcontext()
        with scope, self._for_decoding():
            batch = encode_batch(self.policy, data, _names(data_samples))
            return run_cycles(self.policy, batch, data_samples, self.max_new_tokens)

    # ----------------------------------------------------------------- helpers

    def _for_decoding(self) -> AbstractContextManager[None]:
        """The scope of rollouts and validation: see ``gather_for_rollout``."""
        if not self.gather_for_rollout:
            return nullcontext()
        return self.policy.weights.of(self.policy.language_model)

    def _adapt_weights(self) -> None:
        """Sets the weights of this step from the rewards of the last ones, alike on all ranks."""
        if self.adaptive_weights is None:
            return
        keys = [f'train/{prefix}/reward_mean' for prefix in LOG_PREFIX.values()]
        rewards = mean_of_logged(keys, self.adaptive_weights.window, self.policy.device)
        if rewards is not None:
            weights = self.adaptive_weights.apply(list(self.initial_weights.values()), rewards)
            self.weights = dict(zip(self.initial_weights, weights, strict=True))

    def _count_skipped(self, not_finite: Sequence[str]) -> None:
        self.skipped_steps += 1
        bad = ', '.join(not_finite)
        print_log(
            f'Step skipped: a loss is not finite ({bad}); {self.skipped_steps} so far',
            logger='current',
            level=logging.WARNING,
        )
        if self.skipped_steps > self.max_skipped_steps:
            raise RuntimeError(
                f'{self.skipped_steps} steps had a loss that is not finite ({bad}), '
                f'max_skipped_steps is {self.max_skipped_steps}: lower the learning rate, or look '
                'for bad data in the log'
            )

    def _log(self, reduced: ReducedLosses) -> None:
        """To the message hub; not returned, since mmengine would optimise every ``loss`` again."""
        hub = MessageHub.get_current_instance()
        rows = {key: float(value) for key, value in reduced.metrics.items()}
        for prefix in LOG_PREFIX.values():
            terms = [v for key, v in reduced.losses.items() if key.startswith(f'{prefix}/')]
            if terms:
                rows[f'{prefix}/loss'] = sum(terms)
        rows['total_loss'] = sum(reduced.losses.values())
        rows['skipped_steps'] = self.skipped_steps
        for key, value in rows.items():
            # A mean over nothing (no scorable reward, say) is left out rather than averaged.
            if math.isfinite(value):
                hub.update_scalar(f'train/{key}', value)


def _weight(name: str, options: dict | None) -> float:
    return from_options(TaskWeight, name, options or {}).weight


def _names(data_samples: Sequence[RegionMeta] | None) -> list[str] | None:
    return None if data_samples is None else [meta.name for meta in data_samples]


def _expect_trainable_only(module: DualLoopModel, incompatible_keys: Any) -> None:
    """Frozen tensors are not part of a training checkpoint, so their absence is no news."""
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    # xtuner's test command loads without looking: nothing at all where the model is wrapped (DDP).
    absent = {key.removeprefix('module.') for key in incompatible_keys.missing_keys} & trainable
    if absent == trainable:
        raise CheckpointError(
            f'none of the {len(trainable)} trained tensors is in the checkpoint: it is of another '
            'model, or several ranks test it by `xtuner test`; use tools/test.py'
        )
    missing = [key for key in incompatible_keys.missing_keys if key in trainable]
    incompatible_keys.missing_keys[:] = missing
