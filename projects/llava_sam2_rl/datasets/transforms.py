"""From a record to the tensors of the Sa2VA batch contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from xtuner.dataset.internvl_dataset import dynamic_preprocess

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.registry import TRANSFORMS
from projects.llava_sam2_rl.structures import RegionMeta, RegionSample

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def prompt_mask_grid(masks: torch.Tensor | np.ndarray, size: int | tuple[int, int]) -> torch.Tensor:
    """The cells of the vision token grid that belong to each region.

    Nearest sampling as in the official model. Where that misses a non-empty mask altogether, every
    cell that the mask touches is set (adaptive max-pooling).

    Args:
        masks: (R, H, W) bool.
        size: Rows and columns of the grid, or one number for both.

    Returns:
        (R, h, w) bool. A region has no cell only where its mask is empty.
    """
    masks = torch.as_tensor(masks)
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f'masks must be (R, H, W) bool, got {tuple(masks.shape)} {masks.dtype}')
    size = (size, size) if isinstance(size, int) else size
    if not len(masks):
        return masks.new_zeros((0, *size))
    grid = F.interpolate(masks[None].to(torch.uint8), size=size, mode='nearest')[0].bool()
    missed = masks.flatten(1).any(1) & ~grid.flatten(1).any(1)
    for region in missed.nonzero().flatten().tolist():
        grid[region] = F.adaptive_max_pool2d(masks[region][None].float(), size)[0] > 0
    return grid


@TRANSFORMS.register_module()
class Sa2VATransform:
    """Makes a :class:`RegionSample` an item for :func:`sa2va_collate`.

    Args:
        image_size: S, side of a tile for the vision model in pixels.
        patch_size: Side of a patch in pixels.
        downsample_ratio: Factor of the pixel shuffle; the token grid has
            ``image_size // patch_size * downsample_ratio`` cells a side.
        grounding_size: G, side of the image for SAM 2 in pixels.
        max_dynamic_patch: Most tiles an image is cut into; 1 resizes it to one tile.
        use_thumbnail: Adds the whole image as last tile where there is more than one.

    The item's keys, and once more with the suffix ``2`` for a paired frame (``None`` without one):

    - ``pixel_values`` (T, 3, S, S) float32, ImageNet-normalised, bicubic
    - ``vp_overall_mask`` (T,) bool, True on the last tile, which shows the whole image
    - ``g_pixel_values`` (3, G, G) uint8, RGB, aspect not kept
    - ``prompt_masks`` (R, h, w) bool, see :func:`prompt_mask_grid`
    - ``masks`` (R, H, W) bool, original size

    and ``meta``, a :class:`RegionMeta`.

    Raises:
        ValueError: The token grid of these sizes is not a whole number, or tiles without a
            thumbnail were asked for (no tile would show the whole image).
    """

    def __init__(
        self,
        image_size: int = 448,
        patch_size: int = 14,
        downsample_ratio: float = 0.5,
        grounding_size: int = 1024,
        max_dynamic_patch: int = 1,
        use_thumbnail: bool = True,
    ) -> None:
        grid = image_size // patch_size * downsample_ratio
        if image_size % patch_size or grid != int(grid) or grid < 1:
            raise ValueError(
                f'image_size {image_size}, patch_size {patch_size} and downsample_ratio '
                f'{downsample_ratio} give no whole token grid ({image_size / patch_size} patches '
                f'a side, {grid} tokens)'
            )
        if max_dynamic_patch > 1 and not use_thumbnail:
            raise ValueError(
                'max_dynamic_patch > 1 needs use_thumbnail=True: region prompts live on the tile '
                'that shows the whole image'
            )
        self.image_size = image_size
        self.grid_size = int(grid)
        self.grounding_size = grounding_size
        self.max_dynamic_patch = max_dynamic_patch
        self.use_thumbnail = use_thumbnail

    @property
    def tokens_per_tile(self) -> int:
        """``<IMG_CONTEXT>`` tokens of one tile."""
        return self.grid_size**2

    def __call__(self, sample: RegionSample) -> dict[str, Any]:
        """Makes the item.

        Raises:
            BadRecord: ``empty_mask``, where a region of either frame has no pixel.
        """
        item = self._frame(sample.image, sample.mask, sample.name)
        if sample.image2 is not None and sample.mask2 is not None:
            second = self._frame(sample.image2, sample.mask2, sample.name)
        else:
            second = dict.fromkeys(item)
        item.update({f'{key}2': value for key, value in second.items()})
        item['meta'] = RegionMeta(
            source=sample.source,
            sample_id=sample.sample_id,
            caption=sample.caption,
            category=sample.category,
            height=sample.image.shape[0],
            width=sample.image.shape[1],
            distractor=sample.distractor,
        )
        return item

    def _frame(self, image: np.ndarray, mask: np.ndarray, name: str) -> dict[str, Any]:
        masks = torch.from_numpy(np.array(mask if mask.ndim == 3 else mask[None]))
        if not len(masks) or not masks.flatten(1).any(1).all():
            raise BadRecord('empty_mask', name)
        picture = Image.fromarray(image)
        tiles = dynamic_preprocess(
            picture,
            max_num=self.max_dynamic_patch,
            image_size=self.image_size,
            use_thumbnail=self.use_thumbnail,
        )
        pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))
        pixels = pixels.permute(0, 3, 1, 2).float().div_(255)
        mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
        vp_overall_mask = torch.zeros(len(tiles), dtype=torch.bool)
        vp_overall_mask[-1] = True
        grounding = picture.resize((self.grounding_size, self.grounding_size))
        return {
            'pixel_values': pixels.sub_(mean).div_(std).contiguous(),
            'vp_overall_mask': vp_overall_mask,
            'g_pixel_values': torch.from_numpy(np.array(grounding)).permute(2, 0, 1).contiguous(),
            'prompt_masks': prompt_mask_grid(masks, self.grid_size),
            'masks': masks,
        }
