"""GRPO of caption -> mask′ -> caption′: the action is the ``[SEG]`` embedding.

Given a caption, ``[SEG]`` and so the mask are deterministic: all rollouts of a group would be the
same and every advantage zero. So the action is the embedding that prompts SAM 2, a Gaussian around
``text_hidden_fcs(h_seg)``. In the order of a step: `sample`, `masks`, `described`,
`ask_likelihoods`, `score`, `loss`.

The way back is what the reward asks for: the teacher's likelihood of the given caption, for which
nothing is decoded, or a caption that the teacher writes.

The captions of a record that has one for each of several regions are the turns of one conversation:
each ``[SEG]`` is an action of its own. One caption that is answered with a ``[SEG]`` for each of
its regions has as many actions in a rollout, and one reward, that of the set of masks; its actions
are to the loss what the tokens of a text are. A caption that nothing in the image fits asks for an
empty mask, of which there is nothing to describe: its reward is that of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
from projects.llava_sam2_rl.models.objectives.rollouts import (
    Rollout,
    num_loss_items,
    score_rollouts,
)
from projects.llava_sam2_rl.models.prompting import segmentation_text
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.segmentation import (
    caption_seg_embeddings,
    masks_at_size,
    on_target_frame,
    segment_clips,
    tracks_at_size,
)
from projects.llava_sam2_rl.models.segmentation_losses import matched_masks
from projects.llava_sam2_rl.models.shared_prefix import SharedPrefixForward, per_seg
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.registry import build_reward
from projects.llava_sam2_rl.rewards import RolloutBatch, matched_iou, needs_of, start
from projects.llava_sam2_rl.rewards.base import Started
from projects.llava_sam2_rl.structures import MeanLoss
from projects.llava_sam2_rl.utils.devices import indices_on
from projects.llava_sam2_rl.utils.masks import cell_counts, prompt_mask_grid


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
        return_trip: Where the reward is read. ``'first_frame'``: off the mask in the frame of the
            caption. ``'propagate'``: SAM 2's memory carries that mask through all frames of the
            clip, and the teacher looks at it in the second frame. Images are the same either way.
            Defaults to ``'first_frame'``.

    Raises:
        ValueError: ``sigma`` is not positive, or ``return_trip`` is unknown.
    """

    reward: Any = None
    sigma: float = 0.5
    aux_mask_weight: float = 1.0
    dims: str = 'mean'
    return_trip: str = 'first_frame'

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f'caption_to_mask.sigma must be positive, got {self.sigma}')
        if self.return_trip not in ('first_frame', 'propagate'):
            raise ValueError(
                "caption_to_mask.return_trip must be 'first_frame' or 'propagate', got "
                f'{self.return_trip!r}'
            )


@dataclass(frozen=True, eq=False)
class SampledMasks:
    """The policy's masks of N actions, in the frames in which they are looked at."""

    #: N × ``(K, H, W)`` float32, a mask for each ``[SEG]``.
    logits: list[Tensor]
    #: N × ``(R, h, w)`` bool: their cells on the token grid, R = K less those that are empty; one
    #: without a cell where nothing is described.
    prompt_masks: list[Tensor]
    #: N, the teacher's; ``None`` where none were written.
    captions: list[str] | None = None
    #: Rewards that are judging the captions.
    started: Started = field(default_factory=dict)
    #: N × T × ``(K, H, W)`` bool, in all frames of clips; ``None`` where only one was looked at.
    tracks: list[list[Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class SegActions:
    """The sampled ``[SEG]`` embeddings of N = S·G rollouts of S captions, A in all.

    A = N where each caption is answered with one ``[SEG]``; those of a rollout are side by side.
    """

    #: ``(A, D)``, G times the same for each caption.
    mean: Tensor
    #: ``(A, 1)``.
    sigma: Tensor
    #: ``(A, D)``.
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
        """Draws G times the actions of each of the batch's S captions."""
        mean = caption_seg_embeddings(policy, batch, batch.captioned)
        rms = mean.pow(2).mean(dim=1, keepdim=True).sqrt()
        rows = self._action_rows(batch, batch.captioned)
        mean, sigma = mean[rows], (self.options.sigma * rms)[rows]
        return SegActions(mean, sigma, mean + sigma * torch.randn_like(mean))

    def masks(
        self, policy: VideoLLaVASAMModel, batch: RegionBatch, drawn: SegActions
    ) -> SampledMasks:
        """What the policy's SAM 2 makes of the actions."""
        repeated, tracks = self._repeated(batch), None
        counts = batch.num_segs(repeated)
        found: Sequence[Tensor]
        if self.options.return_trip == 'propagate':
            carried = segment_clips(policy, batch, repeated, drawn.actions, counts)
            tracks = tracks_at_size(carried, [batch.clip_masks[i] for i in repeated])
            found = on_target_frame(batch, repeated, carried)
        else:
            images = per_seg([batch.image[i] for i in repeated], counts)
            low_res, _, _ = policy.segment(drawn.actions, batch.features, images)
            found = low_res.squeeze(1).split(counts)
        seen = self._seen(batch)
        logits = [
            torch.cat(masks_at_size(x, list(seen.seg_masks[i])))
            for x, i in zip(found, repeated, strict=True)
        ]
        found_grids = [prompt_mask_grid(x > 0, policy.grid_size) for x in logits]
        grids = [
            _described(grid, counts)
            for grid, counts in zip(found_grids, cell_counts(found_grids), strict=True)
        ]
        for grid, i in zip(grids, repeated, strict=True):
            if not len(batch.prompt_masks[i]):
                grid[:] = False
        return SampledMasks(logits, grids, tracks=tracks)

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
        pending = queue_likelihoods(shared, queries, self.needs, self._seen(batch))
        return replace(pending, metrics={**pending.metrics, 'num_captions_cut': float(cut)})

    def described(
        self,
        policy: VideoLLaVASAMModel,
        teacher: EMATeacher,
        batch: RegionBatch,
        found: SampledMasks,
        max_new_tokens: int,
    ) -> SampledMasks:
        """The masks with the teacher's captions; rewards that take their time have been started."""
        repeated = self._repeated(batch)
        with phase('return_trip'), teacher.applied_to(policy):
            captions = write_captions(
                policy,
                batch,
                max_new_tokens,
                images=[self._seen(batch).image[i] for i in repeated],
                prompt_masks=found.prompt_masks,
                names=[batch.names[i] for i in repeated],
            )
        started = start(self.reward, self._texts(batch, captions))
        return replace(found, captions=captions, started=started)

    def _texts(self, batch: RegionBatch, captions: list[str] | None) -> RolloutBatch:
        """What rewards read of the teacher's captions."""
        repeated = self._repeated(batch)
        return RolloutBatch(
            completions=captions,
            num_generations=self.num_generations,
            direction='caption_to_mask',
            references=[
                batch.captions[i] if len(batch.prompt_masks[i]) else None for i in repeated
            ],
            sample_ids=[batch.names[i] for i in repeated],
        )

    def score(
        self,
        policy: VideoLLaVASAMModel,
        batch: RegionBatch,
        drawn: SegActions,
        found: SampledMasks,
        ref_action_mean: Tensor | None,
        keep_old_logps: bool,
        likelihoods: CaptionLikelihoods,
    ) -> Rollout:
        """Compares what the return trip gave with the captions that were given.

        Args:
            policy: The network.
            batch: The batch.
            drawn: The actions.
            found: N masks of the actions, with captions where some were written.
            ref_action_mean: ``(M, D)``, one for each ``[SEG]`` of the S answers, or ``None``.
            keep_old_logps: Whether several updates follow, which need the log-probs of now.
            likelihoods: What `ask_likelihoods` asked for.
        """
        repeated, seen = self._repeated(batch), self._seen(batch)
        nothing = [n for n, i in enumerate(repeated) if not len(batch.prompt_masks[i])]
        reward_inputs = replace(
            self._texts(batch, found.captions),
            prompts=[segmentation_text(policy, batch, i) for i in repeated],
            gt_masks=[seen.seg_masks[i] for i in repeated],
            pred_mask_logits=found.logits,
            gt_tracks=found.tracks and [batch.clip_masks[i] for i in repeated],
            pred_tracks=found.tracks,
            **likelihoods.fields,
        )
        rewards = score_rollouts(self.reward, reward_inputs, found.started)
        if nothing and rewards.failure is None:
            empty = {n: seen.gt_masks[repeated[n]][None] for n in nothing}
            rewards = rewards.overridden(
                {n: matched_iou(found.logits[n] > 0, mask) for n, mask in empty.items()}
            )
        old = None
        if keep_old_logps:
            logps = gaussian_logprob(drawn.actions, drawn.mean, drawn.sigma, self.options.dims)
            old = _by_rollout(logps, batch.num_segs(repeated))
        return Rollout(
            samples=batch.captioned,
            records=[batch.image[i] for i in batch.captioned],
            regions=[batch.gt_masks[i] for i in batch.captioned],
            captions=found.captions or (),
            actions=drawn.actions,
            sigma=drawn.sigma,
            old_per_token_logps=old,
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
            mean: ``(M, D)`` mean actions under the policy, with gradient: one for each ``[SEG]`` of
                the S answers.
        """
        dims, samples = self.options.dims, rollout.samples
        rows = self._action_rows(batch, samples)
        num_segs = batch.num_segs(samples)
        counts = [count for count in num_segs for _ in range(self.num_generations)]
        assert rollout.actions is not None
        assert rollout.sigma is not None
        logps = _by_rollout(
            gaussian_logprob(rollout.actions, mean[rows], rollout.sigma, dims), counts
        )
        kl = None
        if rollout.ref_action_mean is not None:
            ref_mean = rollout.ref_action_mean[rows]
            kl = _by_rollout(gaussian_kl(mean[rows], ref_mean, rollout.sigma, dims), counts)
        given = torch.ones(len(rows), dtype=torch.bool, device=logps.device)
        mask = _by_rollout(given, counts)
        loss, metrics = self.head(
            logps,
            rollout.old_per_token_logps,
            None,
            mask,
            rollout.scored,
            per_token_kl=kl,
            reward_std=rollout.reward_std,
        )
        losses = {'grpo_loss': MeanLoss(loss, num_loss_items(self.head, rollout, mask))}
        if self.options.aux_mask_weight > 0:
            images = per_seg([batch.image[i] for i in samples], num_segs)
            low_res, _, _ = policy.segment(mean, batch.features, images)
            masks = [x for i in samples for x in batch.seg_masks[i]]
            masks = matched_masks(low_res.squeeze(1), masks, num_segs)
            auxiliary, parts = mask_loss(low_res.squeeze(1), masks)
            losses['mask_loss'] = MeanLoss(self.options.aux_mask_weight * auxiliary, len(masks))
            metrics = {**metrics, **parts}
        return losses, metrics

    def _seen(self, batch: RegionBatch) -> RegionBatch:
        """The samples in the frames in which their masks are looked at."""
        return batch.on_target() if self.options.return_trip == 'propagate' else batch

    def _repeated(self, batch: RegionBatch) -> list[int]:
        """The sample of each of the N rollouts."""
        return [i for i in batch.captioned for _ in range(self.num_generations)]

    def _action_rows(self, batch: RegionBatch, samples: Sequence[int]) -> Tensor:
        """``(A,)`` int64: which mean action each of the A actions is drawn around."""
        rows: list[int] = []
        first = 0
        for count in batch.num_segs(samples):
            rows += [*range(first, first + count)] * self.num_generations
            first += count
        return indices_on(batch.features.vit.device, rows)


def _by_rollout(values: Tensor, counts: Sequence[int]) -> Tensor:
    """``(A,)`` values of actions as ``(N, T)``, T the most of a rollout; 0 behind its last."""
    return pad_sequence(list(values.split(list(counts))), batch_first=True)


def _described(grid: Tensor, num_cells: Sequence[int]) -> Tensor:
    """The regions ``(R, h, w)`` that have a cell; one without, where none has."""
    filled = [region for region, count in zip(grid, num_cells, strict=True) if count]
    return torch.stack(filled) if filled else grid[:1]
