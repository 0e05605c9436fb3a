"""From a record to the tensors of the Sa2VA batch contract."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from projects.llava_sam2_rl.datasets.base import BadRecord, check_frames
from projects.llava_sam2_rl.registry import TRANSFORMS
from projects.llava_sam2_rl.structures import RegionMeta, RegionSample
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize_bicubic(image: np.ndarray, height: int, width: int, exact: bool = True) -> torch.Tensor:
    """A picture in another size, aspect not kept.

    torch's antialiased kernel is PIL's ``BICUBIC`` to one level of 255 (mean difference on
    photographs below 0.2) at a fraction of the time.

    Args:
        image: (H, W, 3) uint8.
        height: Rows of the result.
        width: Columns of the result.
        exact: ``False`` lets OpenCV enlarge, three times as fast again; its cubic is a little
            sharper (mean difference on photographs 0.2 to 0.6 of 255). Never used to shrink: it
            does not antialias.

    Returns:
        (3, height, width) uint8, contiguous.
    """
    if not exact and height >= image.shape[0] and width >= image.shape[1]:
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
        planes = np.empty((3, height, width), np.uint8)
        cv2.split(resized, list(planes))
        return torch.from_numpy(planes)
    pixels = torch.from_numpy(np.require(image, requirements='W')).permute(2, 0, 1)[None]
    pixels = F.interpolate(pixels, size=(height, width), mode='bicubic', antialias=True)
    return pixels[0].contiguous()


def tile_grid(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """The grid of tiles that InternVL cuts an image into (Chen et al. 2024, arXiv:2404.16821).

    It is the one whose aspect ratio is nearest to the image's. Of several equally near ones it is
    the largest that has less than twice the image's area; where there is none, the smallest.

    Args:
        width: Of the image in pixels.
        height: Of the image in pixels.
        side: Of a tile in pixels.
        most: Number of tiles that there may be, the thumbnail not counted.

    Returns:
        Columns and rows.
    """
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    distances = [abs(width / height - columns / rows) for columns, rows in grids]
    nearest = [grid for grid, d in zip(grids, distances, strict=True) if d == min(distances)]
    filled = [(c, r) for c, r in nearest if width * height > 0.5 * side * side * c * r]
    return filled[-1] if filled else nearest[0]


def _regions(mask: np.ndarray) -> torch.Tensor:
    """A mask as ``(R, H, W)`` bool."""
    return torch.from_numpy(np.array(mask if mask.ndim == 3 else mask[None]))


@TRANSFORMS.register_module()
class Sa2VATransform:
    """Makes a :class:`RegionSample` an item for :func:`sa2va_collate`.

    In the config of a run the four sizes are left out: its loops fill in those of the model
    (`complete_dataloader`). For the transform of a model at hand:
    ``Sa2VATransform(**image_sizes(model.config))``.

    Args:
        image_size: S, side of a tile for the vision model in pixels. Defaults to the model's in a
            run, to 448 elsewhere.
        patch_size: Side of a patch in pixels. Defaults to the model's in a run, to 14 elsewhere.
        downsample_ratio: Factor of the pixel shuffle; the token grid has
            ``image_size // patch_size * downsample_ratio`` cells a side. Defaults to the model's
            in a run, to 0.5 elsewhere.
        grounding_size: G, side of the image for SAM 2 in pixels. Defaults to the model's in a run,
            to 1024 elsewhere.
        max_dynamic_patch: Maximum number of tiles an image is cut into; 1 resizes it to one tile.
            Defaults to 1.
        use_thumbnail: Add the whole image as last tile where there is more than one. Defaults to
            True.

    The item's keys, and once more with the suffix ``2`` for a paired frame (``None`` without one):

    - ``pixel_values`` (T, 3, S, S) float32, ImageNet-normalised, bicubic as PIL's
    - ``vp_overall_mask`` (T,) bool, True on the last tile, which shows the whole image
    - ``g_pixel_values`` (3, G, G) uint8, RGB, aspect not kept
    - ``prompt_masks`` (R, h, w) bool, see :func:`prompt_mask_grid`
    - ``masks`` (R, H, W) bool, original size

    Of a clip, that frame is the last one that shows every region. ``frame2`` says which of the T
    frames it is, ``clip`` holds the others behind the first: a list of dicts with ``frame``,
    ``g_pixel_values`` and ``masks``. Of more than two frames ``clip_pixel_values`` (T, 3, S, S)
    has all of them, a tile each; else it is ``None``.

    ``meta`` is a :class:`RegionMeta`; ``conversation``: the ``(question, answer)`` turns of a
    record that speaks of the whole image (R = 0), ``None`` for records of regions;
    ``region_captions``: R texts where each region has its own, else ``None``. R = 0 with a caption
    is a description of nothing in the image.

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
        self.sizes = dict(
            image_size=image_size,
            patch_size=patch_size,
            downsample_ratio=downsample_ratio,
            grounding_size=grounding_size,
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
            BadRecord: ``empty_mask``, where a region has no pixel in the first frame or in any
                later one, or where there is no region, no conversation, and no caption that nothing
                in the image fits; ``late_mask`` or ``frame_size``, see `check_frames`.
        """
        conversation = sample.conversation or None
        if sample.num_regions == 0 and conversation is None and not sample.texts:
            raise BadRecord('empty_mask', sample.name)
        check_frames(sample)
        item = self._frame(sample.image, sample.mask, sample.name)
        later = sample.later_frame
        second = dict.fromkeys(item)
        if later is not None:
            second = self._frame(*sample.frames[later], sample.name)
        item.update({f'{key}2': value for key, value in second.items()})
        item['frame2'] = later
        item['clip'] = [
            {'frame': t, **self._grounding(image), 'masks': _regions(mask)}
            for t, (image, mask) in enumerate(sample.frames)
            if t not in (0, later)
        ]
        item['clip_pixel_values'] = None
        if item['clip']:
            side = self.image_size
            frames = [resize_bicubic(image, side, side) for image, _ in sample.frames]
            item['clip_pixel_values'] = _normalised(torch.stack(frames))
        item['conversation'] = conversation
        item['region_captions'] = sample.region_captions or None
        item['seg_per_region'] = sample.seg_per_region
        item['meta'] = RegionMeta(
            source=sample.source,
            sample_id=sample.sample_id,
            caption=sample.caption,
            category=sample.category,
            height=sample.image.shape[0],
            width=sample.image.shape[1],
            distractor=sample.distractor,
            attributes=sample.attributes,
        )
        return item

    def _frame(self, image: np.ndarray, mask: np.ndarray, name: str) -> dict[str, Any]:
        masks = _regions(mask)
        prompt_masks = prompt_mask_grid(masks, self.grid_size)
        # A region has no cell only where its mask is empty.
        if not prompt_masks.flatten(1).any(1).all():
            raise BadRecord('empty_mask', name)
        tiles = self._tiles(image)
        vp_overall_mask = torch.zeros(len(tiles), dtype=torch.bool)
        vp_overall_mask[-1] = True
        return {
            'pixel_values': _normalised(tiles),
            'vp_overall_mask': vp_overall_mask,
            **self._grounding(image),
            'prompt_masks': prompt_masks,
            'masks': masks,
        }

    def _grounding(self, image: np.ndarray) -> dict[str, torch.Tensor]:
        side = self.grounding_size
        return {'g_pixel_values': resize_bicubic(image, side, side, exact=False)}

    def _tiles(self, image: np.ndarray) -> torch.Tensor:
        """(T, 3, S, S) uint8, the whole image last."""
        side = self.image_size
        whole = resize_bicubic(image, side, side)[None]
        if self.max_dynamic_patch == 1:
            return whole
        height, width = image.shape[:2]
        columns, rows = tile_grid(width, height, side, self.max_dynamic_patch)
        if rows * columns == 1:
            return whole
        large = resize_bicubic(image, rows * side, columns * side)
        tiles = large.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
        return torch.cat([tiles.reshape(rows * columns, 3, side, side), whole])


def _normalised(tiles: torch.Tensor) -> torch.Tensor:
    """uint8 tiles ``(T, 3, S, S)`` -> float32, as InternViT wants them."""
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return tiles.float().div_(255).sub_(mean).div_(std)
