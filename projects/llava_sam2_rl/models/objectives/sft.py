"""Plain supervision: the mask loss of the return trip, and caption cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from projects.llava_sam2_rl.models.objectives.segmentation import segmentation_losses
from projects.llava_sam2_rl.registry import OBJECTIVES

if TYPE_CHECKING:
    from projects.llava_sam2_rl.models.dual_loop import DualLoopModel, LoopBatch


@OBJECTIVES.register_module()
class SFTObjective:
    """Supervised training of both directions.

    mask_to_caption: the teacher writes a caption greedily; the policy draws it back, on the paired
    frame where there is one, and the mask loss says how well. Where a reference caption exists,
    its cross-entropy is added. caption_to_mask: the policy draws the reference caption.

    Args:
        caption_weight: Of the caption cross-entropy.
        mask_weight: Of the mask loss (2·CE + 0.5·Dice, as in the official recipe).
        return_weight: Of the return trip's mask loss, on top of ``mask_weight``. A generated
            caption may fit several regions; a segmenter that is taught to guess which one was
            meant listens less, so keep it low where captions are vague.
        answer_weight: Of the cross-entropy of the answer that holds ``[SEG]``, so that it stays
            generated.
        num_points: Points sampled on each mask.
    """

    def __init__(
        self,
        caption_weight: float = 1.0,
        mask_weight: float = 1.0,
        return_weight: float = 1.0,
        answer_weight: float = 0.1,
        num_points: int = 12544,
    ):
        self.caption_weight = caption_weight
        self.mask_weight = mask_weight
        self.return_weight = return_weight
        self.answer_weight = answer_weight
        self.num_points = num_points

    def __call__(
        self, loop: DualLoopModel, batch: LoopBatch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """Losses to be optimised and metrics to be logged, keyed ``loop1/…`` and ``loop2/…``."""
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor | float] = {}
        captioned = [i for i, caption in enumerate(batch.captions) if caption]

        weight = loop.mask_to_caption_weight
        if weight > 0:
            with loop.teacher_applied():
                written = loop.write_captions(batch)
            metrics['loop1/empty_captions'] = float(sum(not text for text in written))
            descriptions = [loop.strip_final_period(text) for text in written]
            self._draw(
                loop, batch, 'loop1', descriptions, batch.target_image, batch.target_masks,
                range(len(batch)), weight * self.return_weight, losses, metrics,
            )  # fmt: skip
            if captioned and self.caption_weight > 0:
                loss = loop.caption_loss(batch, captioned, count_as='loop1/caption_loss')
                losses['loop1/caption_loss'] = weight * self.caption_weight * loss

        weight = loop.caption_to_mask_weight
        if weight > 0 and captioned:
            descriptions = [loop.strip_final_period(batch.captions[i]) for i in captioned]
            images = [batch.image[i] for i in captioned]
            masks = [batch.union_masks[i] for i in captioned]
            self._draw(
                loop, batch, 'loop2', descriptions, images, masks,
                captioned, weight, losses, metrics,
            )  # fmt: skip
        return losses, metrics

    def _draw(
        self, loop, batch, key, descriptions, images, masks, samples, weight, losses, metrics
    ) -> None:
        found, logs, _ = segmentation_losses(
            loop,
            batch,
            descriptions,
            images,
            masks,
            [batch.names[i] for i in samples],
            mask_weight=weight * self.mask_weight,
            answer_weight=weight * self.answer_weight,
            num_points=self.num_points,
        )
        losses.update({f'{key}/{name}': value for name, value in found.items()})
        batch.counts.update({f'{key}/{name}': len(samples) for name in found})
        metrics.update({f'{key}/{name}': value for name, value in logs.items()})
