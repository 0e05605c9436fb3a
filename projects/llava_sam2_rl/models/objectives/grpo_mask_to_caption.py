"""GRPO of mask -> caption -> mask′: the action is a sampled caption.

In the order of a step: `sample`, `ask_return_trip` and `return_trip`, `score`, `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.losses import RewardLossHead
from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.captioning import sample_captions
from projects.llava_sam2_rl.models.generation import Completions, Sampling
from projects.llava_sam2_rl.models.likelihoods import (
    CaptionLikelihoods,
    CaptionQueries,
    PendingLikelihoods,
    queue_likelihoods,
    reads_likelihoods,
)
from projects.llava_sam2_rl.models.objectives.rollouts import (
    Rollout,
    num_loss_items,
    score_rollouts,
)
from projects.llava_sam2_rl.models.prompting import region_texts
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.segmentation import (
    masks_at_size,
    on_target_frame,
    segment_clips,
    tracks_at_size,
)
from projects.llava_sam2_rl.models.shared_prefix import PromptHandles, SharedPrefixForward
from projects.llava_sam2_rl.prompts import strip_final_period
from projects.llava_sam2_rl.registry import build_reward
from projects.llava_sam2_rl.rewards import RolloutBatch, needs_of
from projects.llava_sam2_rl.rewards.base import NOTHING_STARTED, Started
from projects.llava_sam2_rl.structures import MeanLoss


@dataclass(frozen=True)
class MaskToCaptionOptions:
    """Options of ``GRPOObjective.mask_to_caption``.

    Args:
        reward: How good a caption is, given the mask that the teacher finds for it, or how the
            teacher reads it (`CaptionLikelihoodReward`). Defaults to `MaskIoUReward`.
        return_trip: Where the teacher looks for what a caption of the first frame describes.
            ``'later_frame'``: on the second frame, where there is one. ``'propagate'``: on the
            first frame, and SAM 2's memory carries the mask through all frames of the clip;
            `MaskIoUReward` is then the mean over the frames. Images are the same either way.
            Defaults to ``'later_frame'``.

    Raises:
        ValueError: ``return_trip`` is unknown.
    """

    reward: Any = None
    return_trip: str = 'later_frame'

    def __post_init__(self) -> None:
        if self.return_trip not in ('later_frame', 'propagate'):
            raise ValueError(
                "mask_to_caption.return_trip must be 'later_frame' or 'propagate', got "
                f'{self.return_trip!r}'
            )


class MaskToCaption:
    """The direction's four parts of a step.

    Args:
        options: The direction's own.
        head: Turns rewards into the loss.
        num_generations: G, captions of each region.
    """

    def __init__(
        self, options: MaskToCaptionOptions, head: RewardLossHead, num_generations: int
    ) -> None:
        self.reward = build_reward(options.reward or {'type': 'MaskIoUReward'})
        self.propagates = options.return_trip == 'propagate'
        #: What the reward reads that costs a pass of the teacher.
        self.needs = needs_of(self.reward)
        self.head = head
        self.num_generations = num_generations

    def sample(
        self, policy: VideoLLaVASAMModel, batch: RegionBatch, sampling: Sampling
    ) -> Completions:
        """Draws G captions of each of the batch's B regions."""
        regions = batch.subset(batch.describable)
        return sample_captions(policy, regions, self.num_generations, sampling)

    def ask_return_trip(
        self, shared: SharedPrefixForward, completions: Completions
    ) -> PromptHandles:
        """Asks the teacher what each of the N = B·G captions describes."""
        return shared.add_descriptions(
            [strip_final_period(text) for text in completions.texts],
            self._asked_images(shared.batch),
            [shared.batch.names[i] for i in self._repeated(shared.batch)],
        )

    def return_trip(
        self, shared: SharedPrefixForward, handles: PromptHandles
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Mask logits that the teacher finds for the N captions.

        Returns:
            ``(N, h, w)``, on the frames of the return trip, and N × ``(1, T, h, w)`` in all frames
            of clips, ``None`` where only one was looked at.
        """
        policy, batch = shared.policy, shared.batch
        embeddings = shared.seg_embeddings(handles)
        if not self.propagates:
            low_res, _, _ = policy.segment(embeddings, batch.features, self._asked_images(batch))
            return low_res.squeeze(1), None
        repeated = self._repeated(batch)
        tracks = segment_clips(policy, batch, repeated, embeddings, [1] * len(repeated))
        return torch.cat(on_target_frame(batch, repeated, tracks)), tracks

    def ask_likelihoods(
        self, shared: SharedPrefixForward, completions: Completions
    ) -> PendingLikelihoods:
        """Asks the teacher how likely the captions are, of their regions and of others."""
        if not reads_likelihoods(self.needs):
            return PendingLikelihoods()
        queries = CaptionQueries(
            samples=self._repeated(shared.batch),
            captions=[
                ids[mask].tolist()
                for ids, mask in zip(
                    completions.completion_ids, completions.completion_mask, strict=True
                )
            ],
            same_caption=False,
            prompt_masks=[None] * len(completions.texts),
        )
        return queue_likelihoods(shared, queries, self.needs)

    def texts(self, batch: RegionBatch, completions: Completions) -> RolloutBatch:
        """What rewards read of N captions before the return trip."""
        repeated = self._repeated(batch)
        return RolloutBatch(
            completions=completions.texts,
            num_generations=self.num_generations,
            direction='mask_to_caption',
            references=[batch.captions[i] for i in repeated],
            sample_ids=[batch.names[i] for i in repeated],
        )

    def score(
        self,
        policy: VideoLLaVASAMModel,
        batch: RegionBatch,
        completions: Completions,
        low_res: Tensor,
        tracks: list[Tensor] | None,
        ref_per_token_logps: Tensor | None,
        keep_old_logps: bool,
        likelihoods: CaptionLikelihoods,
        started: Started = NOTHING_STARTED,
    ) -> Rollout:
        """Compares the masks found with the regions described.

        Args:
            policy: The network.
            batch: The batch; B of its samples have a region.
            completions: N captions.
            low_res: ``(N, h, w)`` mask logits of the return trip.
            tracks: N × ``(1, T, h, w)``, the same in all frames of clips, or ``None``.
            ref_per_token_logps: ``(N, T)`` or ``None``.
            keep_old_logps: Whether several updates follow, which need the log-probs of now.
            likelihoods: What `ask_likelihoods` asked for.
            started: Rewards that were started on `texts`.
        """
        repeated = self._repeated(batch)
        samples = batch.describable
        regions = batch.subset(samples)
        texts = region_texts(policy, batch, regions.image, regions.prompt_masks)
        prompts = dict(zip(samples, texts, strict=True))
        gt = [batch.target_masks[i] for i in repeated]
        gt_tracks = pred_tracks = None
        if tracks is not None:
            gt_tracks = [[x.any(0, keepdim=True) for x in batch.clip_masks[i]] for i in repeated]
            pred_tracks = tracks_at_size(tracks, gt_tracks)
        reward_inputs = replace(
            self.texts(batch, completions),
            prompts=[prompts[i] for i in repeated],
            gt_masks=[mask[None] for mask in gt],
            pred_mask_logits=masks_at_size(low_res, gt),
            gt_tracks=gt_tracks,
            pred_tracks=pred_tracks,
            completion_lengths=completions.completion_mask.sum(1).tolist(),
            truncated=completions.truncated.tolist(),
            **likelihoods.fields,
        )
        return Rollout(
            samples=samples,
            records=[batch.image[i] for i in samples],
            regions=[batch.gt_masks[i] for i in samples],
            captions=completions.texts,
            completions=completions,
            old_per_token_logps=completions.per_token_logps if keep_old_logps else None,
            ref_per_token_logps=ref_per_token_logps,
            reward_inputs=reward_inputs,
            rewards=score_rollouts(self.reward, reward_inputs, started),
            metrics=likelihoods.metrics,
        )

    def loss(
        self, rollout: Rollout, per_token_logps: Tensor, entropy: Tensor | None
    ) -> tuple[dict[str, MeanLoss], Mapping[str, Tensor]]:
        """The clipped policy gradient loss of one update.

        Args:
            rollout: Scored.
            per_token_logps: ``(N, T)`` under the policy, with gradient.
            entropy: ``(N, T)`` of the policy's distributions.
        """
        completions = rollout.completions
        assert completions is not None
        mask, truncated = completions.completion_mask, completions.truncated
        loss, metrics = self.head(
            per_token_logps,
            rollout.old_per_token_logps,
            rollout.ref_per_token_logps,
            mask,
            rollout.scored,
            entropy=entropy,
            truncated=truncated,
            reward_std=rollout.reward_std,
        )
        count = num_loss_items(self.head, rollout, mask, truncated)
        return {'grpo_loss': MeanLoss(loss, count)}, metrics

    def _repeated(self, batch: RegionBatch) -> list[int]:
        """The sample of each of the N rollouts."""
        return [i for i in batch.describable for _ in range(self.num_generations)]

    def _asked_images(self, batch: RegionBatch) -> list[int]:
        """The frame in which the teacher is asked for what each caption describes."""
        images = batch.image if self.propagates else batch.target_image
        return [images[i] for i in self._repeated(batch)]
