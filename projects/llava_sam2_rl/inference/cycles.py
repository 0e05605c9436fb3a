"""Both ways round on one photograph, as a user asks: the model writes freely, greedily.

Validation measures the same (`CycleMetric`), but gives the model its answer up to the ``[SEG]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from projects.llava_sam2_rl.inference.answers import Segmentation
from projects.llava_sam2_rl.inference.pictures import Picture
from projects.llava_sam2_rl.inference.regions import Region
from projects.llava_sam2_rl.inference.sa2va import Sa2VA, names_something
from projects.llava_sam2_rl.rewards.mask_iou import mask_iou
from projects.llava_sam2_rl.rewards.meteor import meteor


@dataclass(frozen=True, eq=False)
class MaskCycle:
    """Mask → caption → mask′.

    Args:
        mask: ``(H, W)`` bool, what was described.
        caption: What the model said of it.
        returned: What it finds for its caption; ``None`` where that has no word to ask by.
        iou: IoU of the mask and the one that came back, 0 where none did.
    """

    mask: np.ndarray
    caption: str
    returned: Segmentation | None
    iou: float


@dataclass(frozen=True, eq=False)
class TextCycle:
    """Text → mask → caption′.

    Args:
        text: What was asked for.
        found: What the model found.
        caption: What it says of the mask it found; ``None`` where it found nothing.
        meteor: METEOR of that caption against the text, 0 where there is none.
    """

    text: str
    found: Segmentation
    caption: str | None
    meteor: float


def mask_to_caption_to_mask(model: Sa2VA, image: Picture, region: Region) -> MaskCycle:
    """Describes a region and looks for what the description says.

    Args:
        model: Makes all of it.
        image: As in `Sa2VA.describe`.
        region: Likewise.

    Raises:
        ValueError: As of `Sa2VA.describe`.
    """
    mask = model.region_mask(image, region)
    caption = model.describe(image, mask)
    if not names_something(caption):
        return MaskCycle(mask, caption, None, 0.0)
    returned = model.segment(image, caption)
    return MaskCycle(mask, caption, returned, mask_iou(returned.mask, mask).item())


def text_to_mask_to_caption(model: Sa2VA, image: Picture, text: str) -> TextCycle:
    """Looks for what a text names and describes what was found.

    Args:
        model: Makes all of it.
        image: As in `Sa2VA.segment`.
        text: Likewise.

    Raises:
        ValueError: As of `Sa2VA.segment`.
    """
    found = model.segment(image, text)
    if not found.found:
        return TextCycle(text, found, None, 0.0)
    caption = model.describe(image, found.mask)
    return TextCycle(text, found, caption, meteor(text, caption))
