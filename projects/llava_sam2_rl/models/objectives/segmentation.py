"""The supervised segmentation pass that SFT and Gumbel share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from projects.llava_sam2_rl.losses.mask import mask_loss

if TYPE_CHECKING:
    from projects.llava_sam2_rl.models.dual_loop import DualLoopModel, LoopBatch


def segmentation_losses(
    loop: DualLoopModel,
    batch: LoopBatch,
    descriptions: Sequence[str | Tensor],
    images: Sequence[int],
    masks: Sequence[Tensor],
    names: Sequence[str],
    *,
    mask_weight: float,
    answer_weight: float,
    num_points: int,
    weights: Sequence[Tensor | None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor | float], Tensor]:
    """The policy draws what is described: mask loss, and cross-entropy of the answer.

    Args:
        loop: The wrapper.
        batch: The batch.
        descriptions: N texts, or embeddings ``(L, D)`` in a text's place.
        images: N indices into ``batch.features``.
        masks: N × ``(H, W)`` bool, what should be found.
        names: N sample names.
        mask_weight: Of the mask loss (2·CE + 0.5·Dice).
        answer_weight: Of the cross-entropy of the answer that holds ``[SEG]``, so that it stays
            generated; 0 = not computed.
        num_points: Points sampled on each mask.
        weights: As of `DualLoopModel.segment_descriptions`.

    Returns:
        Losses, metrics, and the ``(N, h, w)`` low-resolution mask logits.
    """
    low_res, answer_loss = loop.segment_descriptions(
        batch, descriptions, images, names, weights=weights, answer_loss=answer_weight > 0
    )
    loss, metrics = mask_loss(low_res, masks, num_points=num_points)
    losses = {'mask_loss': mask_weight * loss}
    if answer_loss is not None:
        losses['answer_loss'] = answer_weight * answer_loss
    return losses, metrics, low_res
