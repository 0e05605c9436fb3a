"""GRPO of caption -> mask′ -> caption′: the action is the ``[SEG]`` embedding.

Given a caption, ``[SEG]`` and so the mask are deterministic: all rollouts of a group would be the
same and every advantage zero. So the action is the embedding that prompts SAM 2, a Gaussian around
``text_hidden_fcs(h_seg)``. In the order of a step: `sample`, `masks`, `ask_likelihoods`,
`return_trip`, `score`, `loss`.

The way back is what the reward asks for: the teacher's likelihood of the given caption, for which
nothing is decoded, or a caption that the teacher writes.

The captions of a record that has one for each of several regions are the turns of one conversation:
each ``[SEG]`` is an action of its own. A caption that nothing in the image fits asks for an empty
mask, of which there is nothing to describe: its reward is that of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.engine.timing import phase
from projects.llava_sam2_rl.losses import RewardLossHead, gaussian_kl, gaussian_logprob
from projects.llava_sam2_rl.losses.mask import mask_loss
from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.captioning import write_captions
from projects.llava_sam2_rl.models.likelihoods import (
    CaptionLikelihoods,
    CaptionQueries,
    PendingLikelihoods,
    queue_likelihoods,
    reads_likelihoods,
    reference_ids,
)
from projects.llava_sam2_rl.models.objectives.rollouts import Rollout, num_loss_items
from projects.llava_sam2_rl.models.prompting import segmentation_text
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.segmentation import caption_seg_embeddings, masks_at_size
from projects.llava_sam2_rl.models.shared_prefix import SharedPrefixForward
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.registry import build_reward
from projects.llava_sam2_rl.rewards import RolloutBatch, matched_iou, needs_of, score
from projects.llava_sam2_rl.structures import MeanLoss
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid


@dataclass(frozen=True)
class CaptionToMaskOptions:
    """Options of ``GRPOObjective.caption_to_mask``.

    Args:
        reward: How good a mask is, given the caption that the teacher writes of it, or how likely
            it finds the caption that was given (`CaptionLikelihoodReward`, for which no caption is
            written). Defaults to `MeteorReward`. A caption of nothing in the image is scored by its
            mask instead: 1 for an empty one, else 0.
        sigma: Standard deviation of the action, as a share of its root mean square, > 0. Defaults
            to 0.5.
        aux_mask_weight: Weight of the mask loss of the mean action, which trains SAM 2's decoder:
            it comes after the action. Defaults to 1.0.
        dims: ``'sum'`` over the embedding's dimensions, which is the log-density, or ``'mean'``,
            which tempers the importance ratio. Defaults to ``'mean'``.

    Raises:
        ValueError: ``sigma`` is not positive.
    """

    reward: Any = None
    sigma: float = 0.5
    aux_mask_weight: float = 1.0
    dims: str = 'mean'

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f'caption_to_mask.sigma must be positive, got {self.sigma}')


@dataclass(frozen=True, eq=False)
class SampledMasks:
    """The policy's masks of N actions."""

    #: N × ``(1, H, W)`` float32.
    logits: list[Tensor]
    #: N × ``(1, h, w)`` bool: their cells on the token grid; none where nothing is described.
    prompt_masks: list[Tensor]


@dataclass(frozen=True, eq=False)
class SegActions:
    """N = S·G sampled ``[SEG]`` embeddings of S captions."""

    #: ``(N, D)``, G times the same for each caption.
    mean: Tensor
    #: ``(N, 1)``.
    sigma: Tensor
    #: ``(N, D)``.
    actions: Tensor


class CaptionToMask:
    """The direction's parts of a step.

    Args:
        options: The direction's own.
        head: Turns rewards into the loss.
        num_generations: G, actions of each caption.
    """

    def __init__(
        self, options: CaptionToMaskOptions, head: RewardLossHead, num_generations: int
    ) -> None:
        self.reward = build_reward(options.reward or {'type': 'MeteorReward'})
        #: What the reward reads that costs a pass of the teacher.
        self.needs = needs_of(self.reward)
        self.options = options
        self.head = head
        self.num_generations = num_generations

    def sample(self, policy: VideoLLaVASAMModel, batch: RegionBatch) -> SegActions:
        """Draws G actions for each of the batch's S captions."""
        mean = caption_seg_embeddings(policy, batch, batch.captioned)
        rms = mean.pow(2).mean(dim=1, keepdim=True).sqrt()
        mean, sigma = (
            x.repeat_interleave(self.num_generations, dim=0)
            for x in (mean, self.options.sigma * rms)
        )
        return SegActions(mean, sigma, mean + sigma * torch.randn_like(mean))

    def masks(
        self, policy: VideoLLaVASAMModel, batch: RegionBatch, drawn: SegActions
    ) -> SampledMasks:
        """What the policy's SAM 2 makes of the actions."""
        repeated = self._repeated(batch)
        images = [batch.image[i] for i in repeated]
        low_res, _, _ = policy.segment(drawn.actions, batch.features, images)
        logits = masks_at_size(low_res.squeeze(1), [batch.gt_masks[i] for i in repeated])
        grids = [prompt_mask_grid(x > 0, policy.grid_size) for x in logits]
        for grid, i in zip(grids, repeated, strict=True):
            if not len(batch.prompt_masks[i]):
                grid[:] = False
        return SampledMasks(logits, grids)

    def ask_likelihoods(
        self, shared: SharedPrefixForward, found: SampledMasks, max_new_tokens: int
    ) -> PendingLikelihoods:
        """Asks the teacher how likely the given captions are as descriptions of the masks."""
        batch, repeated = shared.batch, self._repeated(shared.batch)
        if not reads_likelihoods(self.needs):
            return PendingLikelihoods()
        captions, cut = reference_ids(shared.policy, batch, batch.captioned, max_new_tokens)
        queries = CaptionQueries(
            samples=repeated,
            captions=[captions[i] for i in repeated],
            same_caption=True,
            prompt_masks=found.prompt_masks,
        )
        pending = queue_likelihoods(shared, queries, self.needs)
        return replace(pending, metrics={**pending.metrics, 'num_captions_cut': float(cut)})

    def return_trip(
        self,
        policy: VideoLLaVASAMModel,
        teacher: EMATeacher,
        batch: RegionBatch,
        found: SampledMasks,
        max_new_tokens: int,
    ) -> list[str]:
        """The teacher's captions of the masks."""
        repeated = self._repeated(batch)
        with phase('return_trip'), teacher.applied_to(policy):
            return write_captions(
                policy,
                batch,
                max_new_tokens,
                images=[batch.image[i] for i in repeated],
                prompt_masks=found.prompt_masks,
                names=[batch.names[i] for i in repeated],
            )

    def score(
        self,
        policy: VideoLLaVASAMModel,
        batch: RegionBatch,
        drawn: SegActions,
        logits: list[Tensor],
        captions: list[str] | None,
        ref_action_mean: Tensor | None,
        keep_old_logps: bool,
        likelihoods: CaptionLikelihoods,
    ) -> Rollout:
        """Compares what the return trip gave with the captions that were given.

        Args:
            policy: The network.
            batch: The batch.
            drawn: N actions.
            logits: N × ``(1, H, W)`` masks of the actions.
            captions: N, the teacher's; ``None`` where none were written.
            ref_action_mean: ``(S, D)`` or ``None``.
            keep_old_logps: Whether several updates follow, which need the log-probs of now.
            likelihoods: What `ask_likelihoods` asked for.
        """
        repeated = self._repeated(batch)
        nothing = [n for n, i in enumerate(repeated) if not len(batch.prompt_masks[i])]
        reward_inputs = RolloutBatch(
            completions=captions,
            num_generations=self.num_generations,
            direction='caption_to_mask',
            prompts=[segmentation_text(policy, batch, i) for i in repeated],
            references=[
                batch.captions[i] if len(batch.prompt_masks[i]) else None for i in repeated
            ],
            gt_masks=[batch.gt_masks[i][None] for i in repeated],
            pred_mask_logits=logits,
            sample_ids=[batch.names[i] for i in repeated],
            **likelihoods.fields,
        )
        with phase('rewards'):
            rewards = score(self.reward, reward_inputs)
        if nothing and rewards.failure is None:
            rewards = rewards.overridden(
                {n: matched_iou(logits[n] > 0, batch.gt_masks[repeated[n]][None]) for n in nothing}
            )
        old = None
        if keep_old_logps:
            old = gaussian_logprob(drawn.actions, drawn.mean, drawn.sigma, self.options.dims)
        return Rollout(
            samples=batch.captioned,
            records=[batch.image[i] for i in batch.captioned],
            regions=[batch.gt_masks[i] for i in batch.captioned],
            captions=captions or (),
            actions=drawn.actions,
            sigma=drawn.sigma,
            old_per_token_logps=None if old is None else old[:, None],
            ref_action_mean=ref_action_mean,
            reward_inputs=reward_inputs,
            rewards=rewards,
            metrics=likelihoods.metrics,
        )

    def loss(
        self, policy: VideoLLaVASAMModel, batch: RegionBatch, rollout: Rollout, mean: Tensor
    ) -> tuple[dict[str, MeanLoss], Mapping[str, Tensor]]:
        """The clipped policy gradient loss of one update, and the mask loss of the mean action.

        Args:
            policy: The network.
            batch: The batch.
            rollout: Scored.
            mean: ``(S, D)`` mean actions under the policy, with gradient.
        """
        dims, group = self.options.dims, self.num_generations
        assert rollout.actions is not None
        assert rollout.sigma is not None
        repeated = mean.repeat_interleave(group, dim=0)
        logps = gaussian_logprob(rollout.actions, repeated, rollout.sigma, dims)[:, None]
        kl = None
        if rollout.ref_action_mean is not None:
            ref_mean = rollout.ref_action_mean.repeat_interleave(group, dim=0)
            kl = gaussian_kl(repeated, ref_mean, rollout.sigma, dims)[:, None]
        ones = torch.ones_like(logps, dtype=torch.bool)
        loss, metrics = self.head(
            logps,
            rollout.old_per_token_logps,
            None,
            ones,
            rollout.scored,
            per_token_kl=kl,
            reward_std=rollout.reward_std,
        )
        losses = {'grpo_loss': MeanLoss(loss, num_loss_items(self.head, rollout, ones))}
        if self.options.aux_mask_weight > 0:
            samples = rollout.samples
            images = [batch.image[i] for i in samples]
            low_res, _, _ = policy.segment(mean, batch.features, images)
            auxiliary, parts = mask_loss(low_res.squeeze(1), [batch.gt_masks[i] for i in samples])
            losses['mask_loss'] = MeanLoss(self.options.aux_mask_weight * auxiliary, len(samples))
            metrics = {**metrics, **parts}
        return losses, metrics

    def _repeated(self, batch: RegionBatch) -> list[int]:
        """The sample of each of the N rollouts."""
        return [i for i in batch.captioned for _ in range(self.num_generations)]
