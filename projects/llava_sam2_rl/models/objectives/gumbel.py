"""The differentiable caption: pseudo tokens, straight-through Gumbel-Softmax, and the way back.

The teacher writes a caption; some of its tokens are replaced by random ones; the policy reads the
result beside the region and says, for every position, which token should stand there. The tokens
it picks enter the segmentation prompt as embeddings, so that the mask loss of the return trip
flows back through the caption into the pass that wrote it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.llava_sam2_rl.losses import gumbel_embeds, length_weights, mask_tokens
from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.captioning import caption_logits, caption_loss, write_captions
from projects.llava_sam2_rl.models.generation import suppressed_token_mask
from projects.llava_sam2_rl.models.objectives.base import (
    LossesAndMetrics,
    Objective,
    with_prefix,
)
from projects.llava_sam2_rl.models.objectives.rollouts import Rollout
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.schedule import GeometricSchedule, current_iteration
from projects.llava_sam2_rl.models.segmentation import (
    captions_as_descriptions,
    masks_at_size,
    segment_descriptions,
)
from projects.llava_sam2_rl.models.segmentation_losses import find_masks, segmentation_losses
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.prompts import (
    encode_text,
    pad_batch,
    strip_final_period,
)
from projects.llava_sam2_rl.registry import OBJECTIVES, from_options
from projects.llava_sam2_rl.rewards.base import Direction
from projects.llava_sam2_rl.structures import MeanLoss
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid
from projects.llava_sam2_rl.utils.modules import eval_mode


@dataclass(frozen=True)
class SoftCaptions:
    """S captions through which a loss reaches the model that wrote them."""

    #: S × ``(L_i, D)``, with no row where there is no caption.
    embeds: list[Tensor]
    #: S × ``(L_i,)``: of each token in the reader's attention; ``None`` where there is no caption.
    weights: list[Tensor | None]
    #: S lists of the ids that the embeddings belong to.
    token_ids: list[list[int]]


@OBJECTIVES.register_module()
class GumbelObjective(Objective):
    """Mask loss through a straight-through Gumbel-Softmax caption.

    mask_to_caption needs no reference captions. caption_to_mask (on captioned samples; turn it off
    by ``model.caption_to_mask=dict(weight=0)``) goes caption -> mask′ -> caption′ and adds the
    cross-entropy of caption′: the region of caption′ is mask′, whose cells carry a straight-through
    factor, so that the mask decoder hears how well its mask could be described.

    Args:
        tau: Temperature of the Gumbel-Softmax: a number, or ``dict(start=…, end=…, steps=…)``,
            geometric from ``start`` to ``end`` over so many iterations. Defaults to 1.0.
        top_k: Most likely tokens that take part at each position. Defaults to 512.
        mask_ratio: Share of the pseudo tokens that are replaced by random ordinary tokens, in
            [0, 1]. Defaults to 0.25.
        mask_weight: Weight of the mask loss (2·CE + 0.5·Dice) as it flows through the caption.
            Defaults to 1.0.
        return_weight: Weight of the same loss, on top of ``mask_weight``, as it trains the
            segmenter that reads the caption, > 0. A caption may fit several regions, and one drawn
            token by token may be wrong; a segmenter that is taught to find the region nevertheless
            learns not to listen. Defaults to 1.0.
        min_pseudo_tokens: Tokens that the teacher writes at least. A position that it does not
            write cannot be learnt, so that captions which stop early would never grow. Defaults
            to 0.
        learn_length: Whether the mask loss also says whether a caption should have ended earlier
            (see `length_weights`); without it captions keep the length they have. Defaults to
            True.
        beta: Weight of the KL to the teacher over all caption positions, the brake on captions
            that only policy and teacher understand; 0 = none, and no teacher pass is made.
            Defaults to 0.1.
        answer_weight: Weight of the cross-entropy of the answer that holds ``[SEG]``, so that it
            stays generated. Defaults to 0.1.
        num_points: Points sampled on each mask. Defaults to 12544.
        gradient_surgery: Whether the gradient of caption_to_mask is projected to be orthogonal to
            that of mask_to_caption where the two conflict. One process or DDP; refused under
            DeepSpeed. Defaults to False.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        tau: float | Mapping[str, float] = 1.0,
        top_k: int = 512,
        mask_ratio: float = 0.25,
        mask_weight: float = 1.0,
        return_weight: float = 1.0,
        min_pseudo_tokens: int = 0,
        learn_length: bool = True,
        beta: float = 0.1,
        answer_weight: float = 0.1,
        num_points: int = 12544,
        gradient_surgery: bool = False,
    ):
        super().__init__()
        if not isinstance(tau, Mapping):
            tau = {'start': tau, 'end': tau}
        try:
            self.tau = from_options(GeometricSchedule, 'GumbelObjective.tau', tau)
        except ValueError as error:
            raise ValueError(f'tau: {error}') from None
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f'mask_ratio must lie in [0, 1], got {mask_ratio}')
        if top_k < 1:
            raise ValueError(f'top_k must be at least 1, got {top_k}')
        if not return_weight > 0:
            raise ValueError(f'return_weight must be positive, got {return_weight}')
        if beta < 0:
            raise ValueError(f'beta must not be negative, got {beta}')
        self.top_k = top_k
        self.mask_ratio = mask_ratio
        self.mask_weight = mask_weight
        self.return_weight = return_weight
        self.min_pseudo_tokens = min_pseudo_tokens
        self.learn_length = learn_length
        self.beta = beta
        self.answer_weight = answer_weight
        self.num_points = num_points
        self.gradient_surgery = gradient_surgery

    def setup(
        self, policy: VideoLLaVASAMModel, directions: Collection[Direction], max_new_tokens: int
    ) -> None:
        """Finds the tokens that a caption may hold.

        Raises:
            ValueError: ``top_k`` exceeds their number.
        """
        super().setup(policy, directions, max_new_tokens)
        tokenizer: Any = policy.tokenizer
        banned = suppressed_token_mask(policy)
        # A random chat marker would end the caption in the policy's eyes.
        banned[[i for i in tokenizer.all_special_ids if i < len(banned)]] = True
        banned[[i for i in tokenizer.get_added_vocab().values() if i < len(banned)]] = True
        stops = [encode_text(tokenizer, stop)[0] for stop in policy.stop_strings]
        stops += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        # Tokens that begin an end: drawn inside a caption they would not end it.
        self._stop_starts = torch.tensor(sorted(set(stops)))
        banned[self._stop_starts] = True
        self._banned = banned
        self._ordinary = (~banned).nonzero().flatten()
        if self.top_k > len(self._ordinary):
            raise ValueError(
                f'top_k={self.top_k} exceeds the {len(self._ordinary)} ordinary tokens of the '
                f'vocabulary of {len(banned)}: set model.objective.top_k to at most that'
            )

    def rollout(
        self, policy: VideoLLaVASAMModel, teacher: EMATeacher, batch: RegionBatch
    ) -> dict[Direction, Rollout]:
        """What the teacher writes of each region, without markers, and some of it replaced."""
        samples = batch.describable
        if 'mask_to_caption' not in self.directions or not samples:
            return {}
        batch = batch.subset(samples)
        with teacher.applied_to(policy):
            pseudo_ids = self._pseudo_ids(policy, batch)
        rows = [i for i, ids in enumerate(pseudo_ids) if ids]
        noised_ids: list[list[int]] = [[] for _ in pseudo_ids]
        for i, ids in zip(rows, self._replace_some(policy, [pseudo_ids[i] for i in rows])):
            noised_ids[i] = ids
        ref_logps = None
        if self.beta > 0 and rows:
            with eval_mode(policy), teacher.applied_to(policy):
                logits = caption_logits(policy, batch, rows, [noised_ids[i] for i in rows])
                ref_logps = logits.float().log_softmax(-1)
        rollout = Rollout(
            samples=samples,
            pseudo_ids=pseudo_ids,
            noised_ids=noised_ids,
            ref_logps=ref_logps,
        )
        return {'mask_to_caption': rollout}

    def losses(
        self,
        policy: VideoLLaVASAMModel,
        batch: RegionBatch,
        rollouts: Mapping[Direction, Rollout],
    ) -> LossesAndMetrics:
        """Mask loss through the caption, and caption loss through the mask."""
        losses: dict[str, MeanLoss] = {}
        metrics: dict[str, Tensor | float] = {}
        if 'mask_to_caption' in rollouts:
            rollout = rollouts['mask_to_caption']
            found, logs = self._through_the_caption(policy, batch.subset(rollout.samples), rollout)
            losses |= with_prefix('mask_to_caption', found)
            metrics |= with_prefix('mask_to_caption', logs)
        # A caption of nothing has no region to be described again.
        captioned = [i for i in batch.captioned if len(batch.prompt_masks[i])]
        if 'caption_to_mask' in self.directions and captioned:
            found, logs = self._through_the_mask(policy, batch, captioned)
            losses |= with_prefix('caption_to_mask', found)
            metrics |= with_prefix('caption_to_mask', logs)
        return losses, metrics

    # --------------------------------------------------- mask -> caption -> mask′

    def _pseudo_ids(self, policy: VideoLLaVASAMModel, batch: RegionBatch) -> list[list[int]]:
        written = write_captions(
            policy, batch, self.max_new_tokens, min_new_tokens=self.min_pseudo_tokens
        )
        return [
            encode_text(policy.tokenizer, strip_final_period(text))[: self.max_new_tokens]
            for text in written
        ]

    def _replace_some(
        self, policy: VideoLLaVASAMModel, captions: Sequence[list[int]]
    ) -> list[list[int]]:
        """Captions, none empty, in which a share of the tokens is random."""
        if not captions:
            return []
        data = pad_batch(captions, policy.pad_token_id, 'right')
        replaced = mask_tokens(
            data['input_ids'], data['attention_mask'], self.mask_ratio, self._ordinary
        )
        return [
            ids[keep].tolist() for ids, keep in zip(replaced, data['attention_mask'], strict=True)
        ]

    def _through_the_caption(
        self, policy: VideoLLaVASAMModel, batch: RegionBatch, rollout: Rollout
    ) -> LossesAndMetrics:
        captions, kl, logs = self.caption_embeds(policy, batch, rollout)
        found = find_masks(
            policy,
            batch,
            # An empty caption is a description without words.
            captions.embeds,
            batch.target_image,
            batch.target_masks,
            batch.names,
            answer_loss=self.return_weight * self.answer_weight > 0,
            weights=captions.weights if self.learn_length else None,
        )
        losses, metrics = segmentation_losses(
            [found],
            mask_weight=self.return_weight * self.mask_weight,
            answer_weight=self.return_weight * self.answer_weight,
            num_points=self.num_points,
        )
        metrics = {**metrics, **logs}
        if kl is not None:
            losses['kl_loss'] = kl.weighted(self.beta)
            metrics['kl_div'] = kl.value.detach()
        pairs = zip(_flat(captions.token_ids), _flat(rollout.pseudo_ids), strict=True)
        kept = [picked == pseudo for picked, pseudo in pairs]
        if kept:
            metrics['pseudo_agreement'] = sum(kept) / len(kept)
        return losses, metrics

    def caption_embeds(
        self, policy: VideoLLaVASAMModel, batch: RegionBatch, rollout: Rollout
    ) -> tuple[SoftCaptions, MeanLoss | None, dict[str, Tensor | float]]:
        """The policy's own caption, position by position, as embeddings with a gradient.

        Args:
            policy: The network.
            batch: The batch of S regions.
            rollout: Its ``noised_ids`` are read; empty where the teacher wrote nothing.

        Returns:
            The captions, their mean KL to the teacher (``None`` without ``beta`` or captions), and
            metrics.
        """
        lengths = [len(ids) for ids in rollout.noised_ids]
        rows = [i for i, length in enumerate(lengths) if length]
        tau = self.tau.at(current_iteration())
        metrics: dict[str, Tensor | float] = {
            'empty_captions': float(len(lengths) - len(rows)),
            'tau': tau,
        }
        embeddings = policy.language_model.get_input_embeddings()
        table = embeddings.weight
        captions = SoftCaptions(
            embeds=[table.new_zeros(0, table.shape[1]) for _ in lengths],
            weights=[None for _ in lengths],
            token_ids=[[] for _ in lengths],
        )
        if not rows:
            return captions, None, metrics
        logits = caption_logits(policy, batch, rows, [rollout.noised_ids[i] for i in rows])
        logps = logits.float().log_softmax(-1)
        with policy.weights.of(embeddings):
            picked, ids = gumbel_embeds(
                logits.masked_fill(self._banned.to(logits.device), float('-inf')),
                table,
                tau=tau,
                top_k=self.top_k,
            )
        log_ends = logps[:, self._stop_starts.to(logps.device)].logsumexp(-1)
        start = 0
        for i in rows:
            span = slice(start, start + lengths[i])
            weights = length_weights(log_ends[span])
            captions.embeds[i], captions.weights[i] = picked[span], weights
            captions.token_ids[i] = ids[span].tolist()
            for x in (captions.embeds[i], weights):
                if self.return_weight != 1 and x.requires_grad:
                    # What reaches the caption does not depend on how much the reader learns.
                    x.register_hook(lambda gradient: gradient / self.return_weight)
            start = span.stop
        kl = None
        if rollout.ref_logps is not None:
            per_token = F.kl_div(rollout.ref_logps, logps, reduction='none', log_target=True)
            kl = MeanLoss(per_token.sum(-1).mean(), sum(lengths))
        metrics['entropy'] = -(logps.detach().exp() * logps.detach()).sum(-1).mean()
        metrics['end_prob'] = log_ends.detach().exp().mean()
        metrics['mean_length'] = sum(lengths) / len(lengths)
        return captions, kl, metrics

    # ------------------------------------------------ caption -> mask′ -> caption′

    def _through_the_mask(
        self, policy: VideoLLaVASAMModel, batch: RegionBatch, captioned: Sequence[int]
    ) -> LossesAndMetrics:
        low_res, _ = segment_descriptions(
            policy,
            batch,
            *captions_as_descriptions(policy, batch, captioned),
            dialogues=[batch.dialogues[i] for i in captioned],
        )
        masks = masks_at_size(low_res.detach(), [batch.gt_masks[i] for i in captioned])
        grids = [prompt_mask_grid(mask > 0, policy.grid_size) for mask in masks]
        found = [n for n, grid in enumerate(grids) if grid.any()]
        metrics: dict[str, Tensor | float] = {'empty_masks': float(len(grids) - len(found))}
        if not found:
            return {'caption_loss': MeanLoss(low_res.sum() * 0.0, 0)}, metrics
        factors = []
        for logits in low_res:
            share = F.adaptive_avg_pool2d(logits.sigmoid()[None], policy.grid_size)
            # 1 in the forward pass; the gradient says which cells help the description.
            factors.append(1 + (share - share.detach()))
        loss = caption_loss(
            policy,
            batch,
            [captioned[n] for n in found],
            [grids[n] for n in found],
            [factors[n] for n in found],
        )
        return {'caption_loss': loss}, metrics


def _flat(rows: Sequence[Sequence[int]]) -> list[int]:
    return [x for row in rows for x in row]
