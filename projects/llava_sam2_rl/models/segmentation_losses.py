"""What the masks that a policy finds for descriptions cost it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from projects.llava_sam2_rl.losses.mask import mask_loss
from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.segmentation import segment_descriptions
from projects.llava_sam2_rl.structures import MeanLoss


def matched_masks(
    low_res: Tensor, masks: Sequence[Tensor], num_segs: Sequence[int] | None
) -> list[Tensor]:
    """The masks of each caption, in the order of the ``[SEG]`` that come closest to them.

    A set has no order that a model could know. So the pairs of a caption are those whose overlaps
    sum to the most (Hungarian matching, as of `matched_iou`); the overlap of a pair is the IoU of
    the predicted probabilities and the mask at their size, which tells pairs apart before any
    pixel is predicted.

    Args:
        low_res: ``(M, h, w)`` mask logits; no gradient flows.
        masks: M × ``(H, W)`` bool.
        num_segs: N numbers that sum to M: neighbours that answer one caption. ``None`` for one
            each, which leaves the order as it is.
    """
    ordered = list(masks)
    first = 0
    for count in num_segs or ():
        span = slice(first, first + count)
        first += count
        if count == 1:
            continue
        found = low_res[span].detach().float().sigmoid().flatten(1)
        wanted = torch.stack(
            [
                F.interpolate(mask[None, None].to(found), low_res.shape[1:], mode='area').flatten()
                for mask in ordered[span]
            ]
        )
        both = found @ wanted.T
        either = found.sum(1)[:, None] + wanted.sum(1)[None] - both
        # A prediction that is not finite ends the step later; here it must not fail.
        overlap = (both / either.clamp(min=1e-6)).nan_to_num().cpu().numpy()
        _, columns = linear_sum_assignment(overlap, maximize=True)
        own = ordered[span]
        ordered[span] = [own[k] for k in columns]
    return ordered


@dataclass(frozen=True, eq=False)
class FoundMasks:
    """What was found for descriptions, and what should have been."""

    #: ``(M, h, w)`` float32 mask logits, with gradient.
    low_res: Tensor
    #: M × ``(H, W)`` bool.
    masks: Sequence[Tensor]
    #: Mean cross-entropy of the answers; ``None`` where it was not computed.
    answer: Tensor | None
    #: N, that it is the mean of.
    num_descriptions: int


def find_masks(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    descriptions: Sequence[str | Tensor],
    images: Sequence[int],
    masks: Sequence[Tensor],
    names: Sequence[str],
    *,
    answer_loss: bool,
    num_segs: Sequence[int] | None = None,
    **options: Any,
) -> FoundMasks:
    """The policy segments what is described, beside what it should find.

    Args:
        policy: The network.
        batch: The batch.
        descriptions: N texts, or embeddings ``(L, D)`` in a text's place.
        images: N indices into ``batch.features``.
        masks: M × ``(H, W)`` bool, what should be found: one for each ``[SEG]``. Those of one
            caption are given to whichever ``[SEG]`` comes closest; see `matched_masks`.
        names: N sample names.
        answer_loss: Whether the answer's cross-entropy is computed.
        num_segs: N numbers. Defaults to one ``[SEG]`` each.
        **options: Of `segment_descriptions`.
    """
    low_res, answer = segment_descriptions(
        policy,
        batch,
        descriptions,
        images,
        names,
        answer_loss=answer_loss,
        num_segs=num_segs,
        **options,
    )
    masks = matched_masks(low_res, masks, num_segs)
    return FoundMasks(low_res, masks, answer, len(descriptions))


def segmentation_losses(
    found: Sequence[FoundMasks], *, mask_weight: float, answer_weight: float, num_points: int
) -> tuple[dict[str, MeanLoss], dict[str, Tensor | float]]:
    """Mask loss, and cross-entropy of the answers, over all that was found.

    Args:
        found: One entry or more.
        mask_weight: Weight of the mask loss (2·CE + 0.5·Dice).
        answer_weight: Weight of the cross-entropy of the answers that hold ``[SEG]``, so that it
            stays generated.
        num_points: Points sampled on each mask.

    Returns:
        Losses ``mask_loss``, mean over the masks, and ``answer_loss``, mean over the descriptions,
        and metrics.
    """
    masks = [mask for part in found for mask in part.masks]
    low_res = found[0].low_res if len(found) == 1 else torch.cat([x.low_res for x in found])
    loss, metrics = mask_loss(low_res, masks, num_points=num_points)
    losses = {'mask_loss': MeanLoss(mask_weight * loss, len(masks))}
    answered = [(x.answer, x.num_descriptions) for x in found if x.answer is not None]
    if answered:
        count = sum(number for _, number in answered)
        mean = answered[0][0]
        if len(answered) > 1:
            mean = torch.stack([answer * (number / count) for answer, number in answered]).sum()
        losses['answer_loss'] = MeanLoss(answer_weight * mean, count)
    return losses, dict(metrics)
