"""GRPO in both directions: rollouts, rewards of the return trip, clipped policy gradient.

mask_to_caption: the action is a sampled caption. caption_to_mask: given a caption, ``[SEG]`` and
so the mask are deterministic, all rollouts of a group would be the same and every advantage zero.
There the action is the prompt embedding itself, a Gaussian around ``text_hidden_fcs(h_seg)``.

On-policy with one iteration the importance ratio is 1 everywhere: the loss value is about 0 (or
beta·KL), its gradient is not. Watch the reward, not the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.engine.distributed import is_shared, spread_over_ranks
from projects.llava_sam2_rl.engine.timing import phase
from projects.llava_sam2_rl.losses import RewardLossHead, gaussian_kl, gaussian_logprob
from projects.llava_sam2_rl.losses.mask import mask_loss
from projects.llava_sam2_rl.models.generation import (
    Completions,
    Sampling,
    no_gradient,
    sample_completions,
)
from projects.llava_sam2_rl.models.sa2va.masks import upsample_logits
from projects.llava_sam2_rl.models.shared_prefix import Asked, Reading
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.prompts import strip_final_period
from projects.llava_sam2_rl.registry import OBJECTIVES, REWARDS, nearest
from projects.llava_sam2_rl.rewards import RewardOutput, RolloutBatch, score
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid

if TYPE_CHECKING:
    from projects.llava_sam2_rl.models.dual_loop import DualLoopModel, LoopBatch

REFERENCES = ('teacher', 'initial', None)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """N = B*G scored rollouts of one direction; what every iteration over them needs.

    Args:
        batch: What the rewards read.
        rewards: Of the N rollouts.
        samples: B indices into the loop batch.
        completions: Sampled captions (mask_to_caption).
        actions: ``(N, D)`` sampled prompt embeddings (caption_to_mask).
        sigma: ``(N, 1)`` their standard deviation.
        old_logps: ``(N, T)`` under the policy that sampled; ``None`` with one iteration.
        reference: ``(N, T)`` log-probs, or ``(B, D)`` mean actions, under the reference.
        reward_std: Standard deviation of the rewards of all ranks; ``None`` where these are all.
    """

    batch: RolloutBatch
    rewards: RewardOutput
    samples: list[int]
    completions: Completions | None = None
    actions: Tensor | None = None
    sigma: Tensor | None = None
    old_logps: Tensor | None = None
    reference: Tensor | None = None
    reward_std: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Actions:
    """``(N, D)`` actions, their ``(N, D)`` mean and ``(N, 1)`` standard deviation."""

    mean: Tensor
    sigma: Tensor
    actions: Tensor


@dataclass(frozen=True, eq=False)
class _Answers:
    """Mask logits ``(N, h, w)`` of the return trip; ``(N, T)`` and ``(B, D)`` of the reference."""

    low_res: Tensor | None
    logps: Tensor | None
    mean: Tensor | None


@dataclass(frozen=True, eq=False)
class _Judged:
    """What a `Reading` was asked for by `GRPOObjective._add`."""

    prompts: list[int] | None
    completions: list[int] | None
    actions: Asked | None
    names: list[str]


@OBJECTIVES.register_module()
class GRPOObjective:
    """Group-relative policy optimisation of captions and of ``[SEG]`` actions.

    Args:
        num_generations: G, rollouts per prompt.
        beta: Weight of the KL to the reference; 0 = none, and no reference pass is made.
        ref: ``'teacher'``, ``'initial'`` (the policy training started from: a float32 copy of the
            trainable tensors) or ``None`` (only with ``beta=0``).
        epsilon_low: Lower clip range.
        epsilon_high: Upper clip range; ``None`` = ``epsilon_low``.
        reduction: ``'grpo' | 'bnpo' | 'dr_grpo' | 'dapo'``.
        scale_rewards: ``'group' | 'batch' | 'none'``.
        importance_sampling_level: ``'token' | 'sequence'``.
        num_iterations: μ, updates per batch of rollouts.
        temperature: Of the sampling.
        top_p: Of the sampling.
        top_k: Of the sampling.
        entropy_coef: Weight of the entropy bonus of captions.
        drop_zero_variance_groups: Leave groups whose rewards are all equal out.
        drop_truncated: Leave captions that hit the length limit out.
        mask_to_caption: ``reward`` of that direction; default `MaskIoUReward`.
        caption_to_mask: ``reward`` (default `MeteorReward`), ``sigma`` (noise of the action as a
            share of its root mean square), ``aux_mask_weight`` (mask loss of the mean action,
            which trains SAM 2's decoder: it comes after the action), ``dims`` (``'sum'``:
            the log-density; ``'mean'`` over the embedding's dimensions, which tempers the ratio).

    Raises:
        ValueError: An option is out of range, or ``beta > 0`` without a reference.
    """

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
        mask_to_caption: Mapping[str, Any] | None = None,
        caption_to_mask: Mapping[str, Any] | None = None,
    ):
        if ref not in REFERENCES:
            raise ValueError(f'ref={ref!r} is unknown: use one of {REFERENCES}')
        if beta > 0 and ref is None:
            raise ValueError(f"beta={beta} needs a reference: set ref='teacher' or beta=0")
        if num_iterations < 1:
            raise ValueError(f'num_iterations must be at least 1, got {num_iterations}')
        self.num_generations = num_generations
        self.beta = beta
        self.ref = ref
        self.num_iterations = num_iterations
        self.top_p, self.top_k, self.temperature = top_p, top_k, temperature
        first = _options('mask_to_caption', mask_to_caption, {'reward': {'type': 'MaskIoUReward'}})
        second = _options(
            'caption_to_mask',
            caption_to_mask,
            {
                'reward': {'type': 'MeteorReward'},
                'sigma': 0.5,
                'aux_mask_weight': 1.0,
                'dims': 'mean',
            },
        )
        if not second['sigma'] > 0:
            raise ValueError(f'caption_to_mask.sigma must be positive, got {second["sigma"]}')
        self.caption_reward = _reward(first['reward'])
        self.mask_reward = _reward(second['reward'])
        self.sigma: float = second['sigma']
        self.aux_mask_weight: float = second['aux_mask_weight']
        self.dims: str = second['dims']
        common = dict(
            num_generations=num_generations,
            reduction=reduction,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            beta=beta,
            scale_rewards=scale_rewards,
            importance_sampling_level=importance_sampling_level,
            drop_zero_variance_groups=drop_zero_variance_groups,
        )
        self.caption_head = RewardLossHead(
            **common, entropy_coef=entropy_coef, drop_truncated=drop_truncated
        )
        self.mask_head = RewardLossHead(**common)
        self._initial: EMATeacher | None = None
        #: The rollouts of the last step, by direction; for logs and pictures.
        self.last: dict[str, Rollouts] = {}

    def attach(self, loop: DualLoopModel) -> None:
        """Called once the policy is built, before any checkpoint is loaded."""
        self.sampling = Sampling(
            max_new_tokens=loop.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )
        self.caption_head.max_completion_length = loop.max_new_tokens
        self.mask_head.max_completion_length = 1
        if self.beta > 0 and self.ref == 'initial':
            self._initial = EMATeacher(loop.policy, decay=1.0)

    def __call__(
        self, loop: DualLoopModel, batch: LoopBatch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """One rollout phase and the losses of its first iteration."""
        rollouts = self.share(self.roll_out(loop, batch), loop.device)
        return self.losses(loop, batch, rollouts)

    # ---------------------------------------------------------------- rollouts

    def roll_out(self, loop: DualLoopModel, batch: LoopBatch) -> dict[str, Rollouts]:
        """Samples, makes the return trip with the teacher and scores, without gradient."""
        rollouts = {}
        with no_gradient(), loop.eval_mode():
            captions = masks = None
            samples = [i for i, caption in enumerate(batch.captions) if caption]
            if loop.mask_to_caption_weight > 0:
                captions = self._sample_captions(loop, batch)
            if loop.caption_to_mask_weight > 0 and samples:
                masks = self._sample_actions(loop, batch, samples)
            answers = self._read(loop, batch, captions, samples if masks else [])
            if captions is not None:
                rollouts['loop1'] = self._score_captions(loop, batch, captions, answers)
            if masks is not None:
                rollouts['loop2'] = self._score_masks(loop, batch, samples, masks, answers)
        self.last = rollouts
        return rollouts

    def share(self, rollouts: dict[str, Rollouts], device: torch.device) -> dict[str, Rollouts]:
        """What the rollouts of one rank need of those of the others; to be called on every rank.

        Args:
            rollouts: Of this rank, by direction; a direction may be absent on some ranks.
            device: Where the collectives run.
        """
        if self.caption_head.scale_rewards != 'batch' or not is_shared():
            return rollouts
        loops = ('loop1', 'loop2')
        found = [rollouts[key].rewards.rewards if key in rollouts else None for key in loops]
        spread = dict(zip(loops, spread_over_ranks(found, device), strict=True))
        self.last = {key: replace(value, reward_std=spread[key]) for key, value in rollouts.items()}
        return self.last

    def _sample_captions(self, loop: DualLoopModel, batch: LoopBatch) -> Completions:
        """G captions of each region."""
        data, _ = loop.region_inputs(batch)
        return sample_completions(
            loop.policy,
            data['embeds'],
            data['attention_mask'],
            self.num_generations,
            self.sampling,
        )

    def _sample_actions(
        self, loop: DualLoopModel, batch: LoopBatch, samples: Sequence[int]
    ) -> _Actions:
        """G actions of each caption."""
        mean = self._mean_actions(loop, batch, samples)
        rms = mean.pow(2).mean(dim=1, keepdim=True).sqrt()
        mean, sigma = (
            x.repeat_interleave(self.num_generations, dim=0) for x in (mean, self.sigma * rms)
        )
        return _Actions(mean, sigma, mean + sigma * torch.randn_like(mean))

    def _read(
        self,
        loop: DualLoopModel,
        batch: LoopBatch,
        captions: Completions | None,
        captioned: Sequence[int],
    ) -> _Answers:
        """The teacher finds what the captions describe; the reference judges what was sampled.

        One pass where the teacher is the reference: return trip, log-probs and mean actions share
        the images' tokens.

        Args:
            loop: The wrapper.
            batch: The batch.
            captions: B·G sampled captions, ``None`` where that direction is off.
            captioned: Samples whose caption is given, of the other direction.
        """
        low_res = logps = mean = None
        with phase('return_trip'), loop.teacher_applied():
            reading = Reading(loop, batch)
            trip = judged = None
            if captions is not None:
                repeated = [i for i in range(len(batch)) for _ in range(self.num_generations)]
                names = [batch.names[i] for i in repeated]
                targets = [batch.target_image[i] for i in repeated]
                texts = [loop.strip_final_period(text) for text in captions.texts]
                trip = reading.add_descriptions(texts, targets, names)
            if self.beta > 0 and self.ref == 'teacher':
                judged = self._add(reading, captions, captioned)
            if trip or judged:
                reading.run()
            if trip:
                prompts = reading.seg_prompts(trip, names)
                low_res = loop.policy.segment(prompts, batch.features, targets)[0].squeeze(1)
            if judged:
                logps, _, mean = self._judged(reading, judged, captions)
        if self.beta > 0 and self.ref == 'initial' and (captions is not None or captioned):
            with phase('log_probs'), self._initial.applied_to(loop.policy):
                reading = Reading(loop, batch)
                judged = self._add(reading, captions, captioned)
                reading.run()
                logps, _, mean = self._judged(reading, judged, captions)
        return _Answers(low_res, logps, mean)

    def _add(
        self, reading: Reading, captions: Completions | None, captioned: Sequence[int]
    ) -> _Judged | None:
        """Asks for the log-probs of the captions and the mean actions of the captioned samples."""
        prompts = completions = actions = None
        if captions is not None:
            prompts = reading.add_regions()
            completions = reading.add_completions(prompts, captions)
        if captioned:
            actions = reading.add_descriptions(*self._captions_of(reading.batch, captioned))
        if completions is None and actions is None:
            return None
        names = [reading.batch.names[i] for i in captioned]
        return _Judged(prompts, completions, actions, names)

    def _judged(
        self, reading: Reading, judged: _Judged, captions: Completions | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs ``(N, T)``, entropy ``(N, T)``, and mean actions ``(B, D)`` in float32."""
        logps = entropy = mean = None
        if judged.completions is not None:
            logps, entropy = reading.logps(
                judged.prompts,
                judged.completions,
                captions,
                self.temperature,
                return_entropy=torch.is_grad_enabled(),
                entropy_gradient=self.caption_head.entropy_coef > 0,
            )
        if judged.actions is not None:
            mean = reading.seg_prompts(judged.actions, judged.names).float()
        return logps, entropy, mean

    def _score_captions(
        self, loop: DualLoopModel, batch: LoopBatch, completions: Completions, answers: _Answers
    ) -> Rollouts:
        group = self.num_generations
        samples = [i for i in range(len(batch)) for _ in range(group)]
        prompts = [loop.region_text(batch, i) for i in range(len(batch))]
        gt = [batch.target_masks[i] for i in samples]
        rollout_batch = RolloutBatch(
            completions=completions.texts,
            num_generations=group,
            direction='mask_to_caption',
            prompts=[prompts[i] for i in samples],
            references=[batch.captions[i] for i in samples],
            gt_masks=[mask[None] for mask in gt],
            pred_mask_logits=_at_original_size(answers.low_res, gt),
            sample_ids=[batch.names[i] for i in samples],
            completion_lengths=completions.completion_mask.sum(1).tolist(),
            truncated=completions.truncated.tolist(),
        )
        with phase('rewards'):
            rewards = score(self.caption_reward, rollout_batch)
        return Rollouts(
            rollout_batch,
            rewards,
            list(range(len(batch))),
            completions=completions,
            old_logps=completions.per_token_logps if self.num_iterations > 1 else None,
            reference=answers.logps,
        )

    def _score_masks(
        self,
        loop: DualLoopModel,
        batch: LoopBatch,
        samples: list[int],
        drawn: _Actions,
        answers: _Answers,
    ) -> Rollouts:
        policy, group = loop.policy, self.num_generations
        repeated = [i for i in samples for _ in range(group)]
        images = [batch.image[i] for i in repeated]
        low_res, _, _ = policy.segment(drawn.actions, batch.features, images)
        gt = [batch.union_masks[i] for i in repeated]
        logits = _at_original_size(low_res.squeeze(1), gt)
        with phase('return_trip'), loop.teacher_applied():
            texts = loop.write_captions(
                batch,
                images=images,
                prompt_masks=[prompt_mask_grid(x > 0, policy.grid_size) for x in logits],
                names=[batch.names[i] for i in repeated],
            )
        rollout_batch = RolloutBatch(
            completions=texts,
            num_generations=group,
            direction='caption_to_mask',
            prompts=[loop.segmentation_text(batch, i) for i in repeated],
            references=[batch.captions[i] for i in repeated],
            gt_masks=[mask[None] for mask in gt],
            pred_mask_logits=logits,
            sample_ids=[batch.names[i] for i in repeated],
        )
        with phase('rewards'):
            rewards = score(self.mask_reward, rollout_batch)
        old = gaussian_logprob(drawn.actions, drawn.mean, drawn.sigma, self.dims)[:, None]
        return Rollouts(
            rollout_batch,
            rewards,
            samples,
            actions=drawn.actions,
            sigma=drawn.sigma,
            old_logps=old if self.num_iterations > 1 else None,
            reference=answers.mean,
        )

    # ------------------------------------------------------------------ losses

    def losses(
        self, loop: DualLoopModel, batch: LoopBatch, rollouts: Mapping[str, Rollouts]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """The losses of one iteration over the rollouts, and the metrics of the step."""
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor | float] = {}
        # Dropout off: the log-probs are compared with those seen while sampling.
        with loop.eval_mode():
            captions = rollouts['loop1'].completions if 'loop1' in rollouts else None
            samples = rollouts['loop2'].samples if 'loop2' in rollouts else []
            with phase('log_probs'):
                reading = Reading(loop, batch)
                judged = self._add(reading, captions, samples)
                if judged:
                    reading.run()
                    logps, entropy, mean = self._judged(reading, judged, captions)
            if 'loop1' in rollouts:
                loss, logs = self._caption_loss(logps, entropy, rollouts['loop1'])
                batch.counts['loop1/grpo_loss'] = self._count(
                    self.caption_head,
                    rollouts['loop1'],
                    rollouts['loop1'].completions.completion_mask,
                    rollouts['loop1'].completions.truncated,
                )
                losses['loop1/grpo_loss'] = loop.mask_to_caption_weight * loss
                metrics.update(_named('loop1', logs))
            if 'loop2' in rollouts:
                loss, auxiliary, logs = self._mask_losses(loop, batch, mean, rollouts['loop2'])
                batch.counts['loop2/grpo_loss'] = self._count(
                    self.mask_head,
                    rollouts['loop2'],
                    torch.ones(len(rollouts['loop2'].batch), 1, dtype=torch.bool),
                )
                batch.counts['loop2/mask_loss'] = len(rollouts['loop2'].samples)
                losses['loop2/grpo_loss'] = loop.caption_to_mask_weight * loss
                if auxiliary is not None:
                    losses['loop2/mask_loss'] = loop.caption_to_mask_weight * auxiliary
                metrics.update(_named('loop2', logs))
        return losses, metrics

    def _caption_loss(
        self, logps: Tensor, entropy: Tensor, rollouts: Rollouts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        completions = rollouts.completions
        return self.caption_head(
            logps,
            rollouts.old_logps,
            rollouts.reference,
            completions.completion_mask,
            rollouts.rewards,
            entropy=entropy,
            truncated=completions.truncated,
            reward_std=rollouts.reward_std,
        )

    def _mask_losses(
        self, loop: DualLoopModel, batch: LoopBatch, mean: Tensor, rollouts: Rollouts
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        group, samples = self.num_generations, rollouts.samples
        repeated = mean.repeat_interleave(group, dim=0)
        logps = gaussian_logprob(rollouts.actions, repeated, rollouts.sigma, self.dims)[:, None]
        kl = None
        if rollouts.reference is not None:
            reference = rollouts.reference.repeat_interleave(group, dim=0)
            kl = gaussian_kl(repeated, reference, rollouts.sigma, self.dims)[:, None]
        loss, logs = self.mask_head(
            logps,
            rollouts.old_logps,
            None,
            torch.ones_like(logps, dtype=torch.bool),
            rollouts.rewards,
            per_token_kl=kl,
            reward_std=rollouts.reward_std,
        )
        auxiliary = None
        if self.aux_mask_weight > 0:
            images = [batch.image[i] for i in samples]
            low_res, _, _ = loop.policy.segment(mean, batch.features, images)
            auxiliary, parts = mask_loss(
                low_res.squeeze(1), [batch.union_masks[i] for i in samples]
            )
            auxiliary = self.aux_mask_weight * auxiliary
            logs.update(parts)
        return loss, auxiliary, logs

    # ----------------------------------------------------------------- helpers

    @staticmethod
    def _count(
        head: RewardLossHead, rollouts: Rollouts, mask: Tensor, truncated: Tensor | None = None
    ) -> float:
        """Of how many items the head's loss is the mean: active tokens, or completions.

        This rank's loss over its own active tokens, weighted by their number, is ``dapo``'s sum
        over the active tokens of all ranks. ``bnpo`` stays the mean over each rank's own tokens.
        """
        if head.reduction != 'dapo':
            return float(len(mask))
        rewards = rollouts.rewards.rewards.to(mask.device)
        return float(head.loss_mask(rewards, mask, truncated).sum())

    @staticmethod
    def _captions_of(
        batch: LoopBatch, samples: Sequence[int]
    ) -> tuple[list[str], list[int], list[str]]:
        """Descriptions, images and names of samples that have a caption."""
        return (
            [strip_final_period(batch.captions[i]) for i in samples],
            [batch.image[i] for i in samples],
            [batch.names[i] for i in samples],
        )

    def _mean_actions(
        self, loop: DualLoopModel, batch: LoopBatch, samples: Sequence[int]
    ) -> Tensor:
        """``(B, D)`` float32: μ, what `text_hidden_fcs` makes of the captions."""
        prompts, _ = loop.seg_prompts(batch, *self._captions_of(batch, samples))
        return prompts.float()


def _at_original_size(low_res: Tensor, gt: Sequence[Tensor]) -> list[Tensor]:
    """N × ``(1, H, W)`` float32 logits, each at the size of its ground truth."""
    return [
        upsample_logits(logits[None, None], tuple(mask.shape))[0]
        for logits, mask in zip(low_res, gt, strict=True)
    ]


def _named(loop: str, logs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Log keys of one direction, with the names users look for."""
    aliases = {
        'reward': 'reward_mean',
        'kl': 'kl_div',
        'policy_term': 'policy_loss',
    }
    return {f'{loop}/{aliases.get(key, key)}': value for key, value in logs.items()}


def _options(direction: str, given: Mapping[str, Any] | None, known: dict) -> dict[str, Any]:
    for key in given or {}:
        if key not in known:
            raise TypeError(
                f'GRPOObjective.{direction} has no option {key!r}: {nearest(key, list(known))}'
            )
    return {**known, **(given or {})}


def _reward(reward: Any) -> Any:
    return REWARDS.build(dict(reward)) if isinstance(reward, Mapping) else reward
