"""GRPO in both directions: rollouts, rewards of the return trip, clipped policy gradient.

On-policy with one iteration the importance ratio is 1 everywhere: the loss value is about 0 (or
beta·KL), its gradient is not. Watch the reward, not the loss.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.engine.distributed import global_std, is_shared
from projects.llava_sam2_rl.engine.timing import phase
from projects.llava_sam2_rl.losses import RewardLossHead
from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.generation import Completions, Sampling
from projects.llava_sam2_rl.models.likelihoods import PendingLikelihoods, read_likelihoods
from projects.llava_sam2_rl.models.objectives.base import (
    LOG_PREFIX,
    LossesAndMetrics,
    Objective,
    with_prefix,
)
from projects.llava_sam2_rl.models.objectives.grpo_caption_to_mask import (
    CaptionToMask,
    CaptionToMaskOptions,
    SampledMasks,
)
from projects.llava_sam2_rl.models.objectives.grpo_mask_to_caption import (
    MaskToCaption,
    MaskToCaptionOptions,
)
from projects.llava_sam2_rl.models.objectives.refill import refill
from projects.llava_sam2_rl.models.objectives.rollouts import (
    PendingLogps,
    Rollout,
    TeacherOutputs,
    renamed,
)
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.segmentation import captions_as_descriptions
from projects.llava_sam2_rl.models.shared_prefix import SharedPrefixForward
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.registry import OBJECTIVES, from_options
from projects.llava_sam2_rl.rewards.base import Direction, can_start, start
from projects.llava_sam2_rl.structures import MeanLoss
from projects.llava_sam2_rl.utils.modules import eval_mode

REFERENCES = ('teacher', 'initial', None)


@OBJECTIVES.register_module()
class GRPOObjective(Objective):
    """Group-relative policy optimisation of captions and of ``[SEG]`` actions.

    Args:
        num_generations: Rollouts per prompt (G). Defaults to 4.
        beta: Weight of the KL to the reference; 0 = none, and no reference pass is made. Defaults
            to 0.1.
        ref: Reference of the KL: ``'teacher'``, ``'initial'`` (the policy that training started
            from: a float32 copy of the trainable tensors) or ``None`` (only with ``beta=0``).
            Defaults to ``'teacher'``.
        epsilon_low: Lower clip range of the importance ratio. Defaults to 0.2.
        epsilon_high: Upper clip range. Defaults to ``epsilon_low``.
        reduction: How the loss is averaged: ``'grpo'``, ``'bnpo'``, ``'dr_grpo'`` or ``'dapo'``.
            Defaults to ``'dapo'``.
        scale_rewards: Divide advantages by the standard deviation of the rewards of the
            ``'group'``, of the ``'batch'`` on all ranks, or ``'none'``. Defaults to ``'group'``.
        importance_sampling_level: Importance ratios per ``'token'`` or per ``'sequence'``.
            Defaults to ``'token'``.
        num_iterations: Updates per batch of rollouts (μ). Defaults to 1.
        temperature: Sampling temperature. Defaults to 1.0.
        top_p: Share of the probability mass that is sampled from; 1 keeps all. Defaults to 1.0.
        top_k: Most likely tokens that are sampled from; 0 keeps all. Defaults to 0.
        entropy_coef: Weight of the entropy bonus of captions. Defaults to 0.0.
        drop_zero_variance_groups: Leave groups whose rewards are all equal out of the loss.
            Defaults to False.
        drop_truncated: Leave captions that hit the length limit out of the loss. Defaults to False.
        max_refills: Most times that a group whose rewards are all equal is sampled again, see
            `refill`: new rollouts replace the old ones where they vary. A step's rollouts may take
            ``1 + max_refills`` times as long. 0 = never. Defaults to 0.
        multi_objective_aggregation: How several rewards become one advantage:
            ``'sum_then_normalize'``, or ``'normalize_then_sum'``: each of the rewards that
            `WeightedRewards` adds up is normalised in its group for itself, their weighted sum over
            the batch of all ranks (GDPO), whatever ``scale_rewards`` says. Defaults to
            ``'sum_then_normalize'``.
        surrogate: What is maximised of each token: ``'clip'`` (PPO, GRPO), ``'cispo'`` or
            ``'sapo'``. Defaults to ``'clip'``.
        sapo_temperature_pos: τ of SAPO for positive advantages. Defaults to 1.0.
        sapo_temperature_neg: τ of SAPO for the others. Defaults to 1.05.
        top_entropy_quantile: Share of a rank's caption tokens, those of the highest entropy, that
            the policy gradient is taken of. Defaults to 1.0.
        mask_to_caption: See `MaskToCaptionOptions`: ``reward``, ``return_trip``.
        caption_to_mask: See `CaptionToMaskOptions`: ``reward``, ``sigma``, ``aux_mask_weight``,
            ``dims``, ``return_trip``.

    Raises:
        ValueError: An option is out of range, or ``beta > 0`` without a reference.
    """

    has_rewards = True

    def __init__(
        self,
        num_generations: int = 4,
        beta: float = 0.1,
        ref: str | None = 'teacher',
        epsilon_low: float = 0.2,
        epsilon_high: float | None = None,
        reduction: str = 'dapo',
        scale_rewards: str = 'group',
        importance_sampling_level: str = 'token',
        num_iterations: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        entropy_coef: float = 0.0,
        drop_zero_variance_groups: bool = False,
        drop_truncated: bool = False,
        max_refills: int = 0,
        multi_objective_aggregation: str = 'sum_then_normalize',
        surrogate: str = 'clip',
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        top_entropy_quantile: float = 1.0,
        mask_to_caption: Mapping[str, Any] | None = None,
        caption_to_mask: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if ref not in REFERENCES:
            raise ValueError(f'ref={ref!r} is unknown: use one of {REFERENCES}')
        if beta > 0 and ref is None:
            raise ValueError(f"beta={beta} needs a reference: set ref='teacher' or beta=0")
        if num_iterations < 1:
            raise ValueError(f'num_iterations must be at least 1, got {num_iterations}')
        if max_refills < 0 or (max_refills > 0 and num_generations < 2):
            raise ValueError(
                f'max_refills must be 0, or more with num_generations >= 2, got {max_refills}'
            )
        self.num_generations = num_generations
        self.max_refills = max_refills
        self.beta = beta
        self.ref = ref
        self.num_iterations = num_iterations
        self.sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        common: dict[str, Any] = dict(
            num_generations=num_generations,
            reduction=reduction,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            beta=beta,
            scale_rewards=scale_rewards,
            importance_sampling_level=importance_sampling_level,
            drop_zero_variance_groups=drop_zero_variance_groups,
            multi_objective_aggregation=multi_objective_aggregation,
            surrogate=surrogate,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
        )
        self.mask_to_caption = MaskToCaption(
            from_options(
                MaskToCaptionOptions, 'GRPOObjective.mask_to_caption', mask_to_caption or {}
            ),
            RewardLossHead(
                **common,
                entropy_coef=entropy_coef,
                drop_truncated=drop_truncated,
                top_entropy_quantile=top_entropy_quantile,
            ),
            num_generations,
        )
        self.caption_to_mask = CaptionToMask(
            from_options(
                CaptionToMaskOptions, 'GRPOObjective.caption_to_mask', caption_to_mask or {}
            ),
            RewardLossHead(**common),
            num_generations,
        )
        self._heads: dict[Direction, RewardLossHead] = {
            'mask_to_caption': self.mask_to_caption.head,
            'caption_to_mask': self.caption_to_mask.head,
        }
        # Captions that a judge is asked about come first: it answers while the others are sampled.
        self._order = list(LOG_PREFIX)[:: -1 if can_start(self.caption_to_mask.reward) else 1]
        self._initial: EMATeacher | None = None

    def setup(
        self, policy: VideoLLaVASAMModel, directions: Collection[Direction], max_new_tokens: int
    ) -> None:
        """Takes the length limit, and a copy of the policy where the reference is ``'initial'``."""
        super().setup(policy, directions, max_new_tokens)
        self.sampling = replace(self.sampling, max_new_tokens=max_new_tokens)
        self.mask_to_caption.head.max_completion_length = max_new_tokens
        self.caption_to_mask.head.max_completion_length = 1
        if self.beta > 0 and self.ref == 'initial':
            self._initial = EMATeacher(policy, decay=1.0)
            self.references.append(self._initial)

    # ---------------------------------------------------------------- rollouts

    def rollout(
        self, policy: VideoLLaVASAMModel, teacher: EMATeacher, batch: RegionBatch
    ) -> dict[Direction, Rollout]:
        """Samples, makes the return trips with the teacher and scores them."""
        # Dropout off: the log-probs of sampling are compared with those of the updates.
        with eval_mode(policy):
            rollouts = self._roll_out(policy, teacher, batch, self.directions)
            if self.max_refills:
                again = partial(self._roll_out, policy, teacher)
                rollouts = refill(
                    rollouts, batch, self._heads, again, self.max_refills, policy.pad_token_id
                )
        return rollouts

    def _roll_out(
        self,
        policy: VideoLLaVASAMModel,
        teacher: EMATeacher,
        batch: RegionBatch,
        directions: Collection[Direction],
    ) -> dict[Direction, Rollout]:
        """The rollouts of some directions; one with nothing to do is absent."""
        first, second = self.mask_to_caption, self.caption_to_mask
        rollouts: dict[Direction, Rollout] = {}
        captions = actions = masks = None
        # 1. Sample G captions of each region and G [SEG] embeddings of each caption.
        for direction in [x for x in self._order if x in directions]:
            if direction == 'mask_to_caption' and batch.describable:
                captions = first.sample(policy, batch, self.sampling)
                started = start(first.reward, first.texts(batch, captions))
            if direction == 'caption_to_mask' and batch.captioned:
                actions = second.sample(policy, batch)
                masks = second.masks(policy, batch, actions)
                # Config and hooks decide, so that all ranks write or none does.
                if self.draw_rollouts or 'completions' in second.needs:
                    masks = second.described(policy, teacher, batch, masks, self.max_new_tokens)

        # 2. One pass of the teacher: the return trip of the captions, the likelihoods that
        # rewards ask for, and the reference.
        found = self._teacher_pass(policy, teacher, batch, captions, masks)

        # 3. Score.
        if captions is not None and found.low_res is not None:
            rollouts['mask_to_caption'] = first.score(
                policy,
                batch,
                captions,
                found.low_res,
                found.tracks,
                found.ref_per_token_logps,
                self.num_iterations > 1,
                found.likelihoods['mask_to_caption'],
                started,
            )
        if actions is not None and masks is not None:
            rollouts['caption_to_mask'] = second.score(
                policy,
                batch,
                actions,
                masks,
                found.ref_action_mean,
                self.num_iterations > 1,
                found.likelihoods['caption_to_mask'],
            )
        return rollouts

    def _teacher_pass(
        self,
        policy: VideoLLaVASAMModel,
        teacher: EMATeacher,
        batch: RegionBatch,
        captions: Completions | None,
        masks: SampledMasks | None,
    ) -> TeacherOutputs:
        """The teacher finds what the captions describe, and says how likely captions are where
        rewards ask; the reference judges what was sampled.

        Where the teacher is the reference it is one pass, which shares the images' tokens. A
        direction that is off or has nothing to do has no captions or no masks.
        """
        samples = [] if masks is None else batch.captioned
        asked: dict[Direction, PendingLikelihoods] = {}
        low_res = tracks = logps = mean = None
        with phase('return_trip'), teacher.applied_to(policy):
            shared = SharedPrefixForward(policy, batch)
            trip = pending = None
            if captions is not None:
                trip = self.mask_to_caption.ask_return_trip(shared, captions)
                asked['mask_to_caption'] = self.mask_to_caption.ask_likelihoods(shared, captions)
            if masks is not None:
                asked['caption_to_mask'] = self.caption_to_mask.ask_likelihoods(
                    shared, masks, self.max_new_tokens
                )
            if self.beta > 0 and self.ref == 'teacher':
                pending = self._queue(shared, captions, samples)
            shared.forward()
            if trip is not None:
                low_res, tracks = self.mask_to_caption.return_trip(shared, trip)
            if pending is not None:
                logps, _, mean = self._read(shared, pending)
            likelihoods = {key: read_likelihoods(shared, value) for key, value in asked.items()}
        if self._initial is not None and self.ref == 'initial':
            with phase('log_probs'), self._initial.applied_to(policy):
                shared = SharedPrefixForward(policy, batch)
                pending = self._queue(shared, captions, samples)
                shared.forward()
                logps, _, mean = self._read(shared, pending)
        return TeacherOutputs(low_res, tracks, logps, mean, likelihoods)

    def synchronize(
        self, rollouts: dict[Direction, Rollout], device: torch.device
    ) -> dict[Direction, Rollout]:
        """Adds the spread of all ranks' rewards, and the advantages."""
        spread: dict[Direction, Tensor | None] = dict.fromkeys(LOG_PREFIX)
        if self.mask_to_caption.head.divides_by_batch and is_shared():
            own = [
                self._heads[d].scaled_by_batch(rollouts[d].scored) if d in rollouts else None
                for d in LOG_PREFIX
            ]
            spread = dict(zip(LOG_PREFIX, global_std(own, device), strict=True))
        self.last_rollouts = {
            direction: replace(
                rollout,
                reward_std=spread[direction],
                advantages=self._heads[direction].advantages(rollout.scored, spread[direction]),
            )
            for direction, rollout in rollouts.items()
        }
        return self.last_rollouts

    # ------------------------------------------------------------------ losses

    def losses(
        self,
        policy: VideoLLaVASAMModel,
        batch: RegionBatch,
        rollouts: Mapping[Direction, Rollout],
    ) -> LossesAndMetrics:
        """The clipped policy gradient losses of one update, from one pass of the policy."""
        losses: dict[str, MeanLoss] = {}
        metrics: dict[str, Tensor | float] = {}
        first, second = rollouts.get('mask_to_caption'), rollouts.get('caption_to_mask')
        with eval_mode(policy):
            with phase('log_probs'):
                shared = SharedPrefixForward(policy, batch)
                pending = self._queue(
                    shared,
                    None if first is None else first.completions,
                    [] if second is None else second.samples,
                )
                shared.forward()
                logps, entropy, mean = self._read(shared, pending)
            if first is not None and logps is not None:
                found, logs = self.mask_to_caption.loss(first, logps, entropy)
                losses |= with_prefix('mask_to_caption', found)
                metrics |= with_prefix('mask_to_caption', {**renamed(logs), **first.metrics})
            if second is not None and mean is not None:
                found, logs = self.caption_to_mask.loss(policy, batch, second, mean)
                losses |= with_prefix('caption_to_mask', found)
                metrics |= with_prefix('caption_to_mask', {**renamed(logs), **second.metrics})
        return losses, metrics

    def _queue(
        self, shared: SharedPrefixForward, captions: Completions | None, samples: Sequence[int]
    ) -> PendingLogps:
        """Asks for the log-probs of captions and for the mean actions of captioned samples."""
        asked = None if captions is None else shared.add_captions(captions)
        actions = None
        if samples:
            actions = shared.add_descriptions(
                *captions_as_descriptions(shared.policy, shared.batch, samples),
                dialogues=[shared.batch.dialogues[i] for i in samples],
                num_segs=shared.batch.num_segs(samples),
            )
        return PendingLogps(asked, actions)

    def _read(
        self, shared: SharedPrefixForward, pending: PendingLogps
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs ``(N, T)``, entropy ``(N, T)``, and mean actions ``(M, D)`` in float32."""
        logps = entropy = mean = None
        if pending.captions is not None:
            logps, entropy = shared.per_token_logps(
                pending.captions,
                self.sampling.temperature,
                return_entropy=torch.is_grad_enabled(),
                entropy_gradient=self.mask_to_caption.head.entropy_coef > 0,
            )
        if pending.actions is not None:
            mean = shared.seg_embeddings(pending.actions).float()
        return logps, entropy, mean
