"""Intersection over union of masks: the one place that divides the one by the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards.base import RolloutBatch


def mask_iou(pred: Tensor | np.ndarray, gt: Tensor | np.ndarray) -> Tensor:
    """IoU of each pair of masks. Two empty masks score 1, one empty mask scores 0.

    Args:
        pred: ``(N, H, W)``, or ``(H, W)`` for one mask; bool, or numbers 0 and 1.
        gt: As ``pred``, of the same shape.

    Returns:
        ``(N,)`` float32 in [0, 1], on the device of ``pred``; ``(1,)`` for one mask.

    Raises:
        ValueError: The shapes differ or a value is neither 0 nor 1.
    """
    return iou_from_counts(*intersection_and_union(pred, gt))


def intersection_and_union(
    pred: Tensor | np.ndarray, gt: Tensor | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Pixels in both and pixels in either mask, for sums over a data set (cIoU).

    Args, errors: As :func:`mask_iou`.

    Returns:
        Two ``(N,)`` int64 tensors.
    """
    pred, gt = _as_bool(pred, 'pred'), _as_bool(gt, 'gt')
    if pred.shape != gt.shape:
        raise ValueError(f'pred is {tuple(pred.shape)} but gt is {tuple(gt.shape)}')
    gt = gt.to(pred.device)
    return (pred & gt).sum(dim=(1, 2)), (pred | gt).sum(dim=(1, 2))


def iou_from_counts(intersection: Tensor, union: Tensor) -> Tensor:
    """Pixel counts of any shape -> float32 IoU; an empty union means both masks are empty: 1."""
    iou = intersection.double() / union.clamp(min=1)
    return torch.where(union == 0, torch.ones_like(iou), iou).float()


def _as_bool(mask: Tensor | np.ndarray, name: str) -> Tensor:
    tensor = torch.as_tensor(mask)
    if tensor.ndim not in (2, 3):
        raise ValueError(f'{name} must be (N, H, W) or (H, W), got shape {tuple(tensor.shape)}')
    if tensor.dtype != torch.bool:
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            raise ValueError(
                f'{name} must hold only 0 and 1, got values from {tensor.min().item()} to '
                f'{tensor.max().item()}; threshold it first'
            )
        tensor = tensor != 0
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


@REWARDS.register_module()
class MaskIoUReward:
    """IoU of the predicted with the true mask, mean over the regions the caption speaks of."""

    name = 'mask_iou'

    def __call__(self, rollouts: RolloutBatch) -> list[float | None]:
        """A number in [0, 1] per rollout; logits are cut at 0 (NaN is outside).

        Raises:
            ValueError: The batch holds no predicted or no true masks.
        """
        if rollouts.pred_mask_logits is None or rollouts.gt_masks is None:
            raise ValueError(
                'MaskIoUReward needs pred_mask_logits and gt_masks, the batch lacks '
                f'{"pred_mask_logits" if rollouts.pred_mask_logits is None else "gt_masks"}'
            )
        return [
            float(mask_iou(logits.detach() > 0, gt).mean())
            for logits, gt in zip(rollouts.pred_mask_logits, rollouts.gt_masks, strict=True)
        ]
