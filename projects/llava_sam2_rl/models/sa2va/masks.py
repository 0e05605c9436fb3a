"""From SAM 2's low-resolution mask logits to masks at an image's size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upsample_masks(low_res_masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks at original size, as the official inference makes them.

    Args:
        low_res_masks: ``(P, 1, h, w)`` logits.
        size: ``(H, W)`` in pixels.

    Returns:
        ``(P, 1, H, W)`` bool: bilinear upsampling, sigmoid above 0.5.
    """
    return upsample_logits(low_res_masks, size) > 0


def upsample_logits(low_res_masks: Tensor, size: tuple[int, int]) -> Tensor:
    """``(P, 1, h, w)`` mask logits as ``(P, 1, H, W)`` float32, bilinear as officially."""
    return F.interpolate(low_res_masks.float(), size=size, mode='bilinear', align_corners=False)
