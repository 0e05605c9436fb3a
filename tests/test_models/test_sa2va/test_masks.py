"""Mask logits at an image's size."""

from __future__ import annotations

import torch

from projects.llava_sam2_rl.models.sa2va.masks import upsample_logits, upsample_masks


def test_bilinear_by_hand():
    logits = torch.tensor([[[[-1.0, 3.0]]]], dtype=torch.bfloat16)
    found = upsample_logits(logits, (1, 4))
    assert found.dtype == torch.float32
    # Centres of the four pixels lie at -0.25, 0.25, 0.75 and 1.25 of the two, clamped outside.
    assert found.tolist() == [[[[-1.0, 0.0, 2.0, 3.0]]]]
    assert upsample_masks(logits, (1, 4)).tolist() == [[[[False, False, True, True]]]]
