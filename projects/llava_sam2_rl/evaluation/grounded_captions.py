"""Grounded conversation generation (GCG): captions whose phrases have masks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from projects.llava_sam2_rl.rewards.mask_iou import iou_matrix


def greedy_mask_miou(pred: Tensor | np.ndarray, gt: Tensor | np.ndarray) -> float:
    """Mask mIoU of one image as the official GCG evaluation has it; its mean over images is mIoU.

    The best pair of a predicted and a true mask is taken, both leave, and so on while a pair
    overlaps; the mean of the pairs' IoU. Masks without a partner lower nothing. (Rewards match by
    the best sum instead, and count those: `rewards.matched_iou`.)

    Args:
        pred: ``(P, H, W)`` bool, or numbers 0 and 1: masks of the phrases of the answer.
        gt: ``(R, H, W)``, likewise: those of the reference.

    Returns:
        A number in [0, 1]; 0 where nothing overlaps.

    Raises:
        ValueError: The masks differ in size or a value is neither 0 nor 1.
    """
    ious = iou_matrix(torch.as_tensor(pred), gt).cpu().numpy()
    paired = []
    while ious.size and ious.max() > 0:
        row, column = np.unravel_index(ious.argmax(), ious.shape)
        paired.append(float(ious[row, column]))
        ious = np.delete(np.delete(ious, row, axis=0), column, axis=1)
    return float(np.mean(paired)) if paired else 0.0
