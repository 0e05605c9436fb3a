"""What the encoders know of images, computed once and shared by every pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from projects.llava_sam2_rl.models.sa2va.building import dtype_of
from projects.llava_sam2_rl.models.sa2va.grounding import GroundingEncoder, SamFeatures
from projects.llava_sam2_rl.models.sa2va.intern_vit import InternViT
from projects.llava_sam2_rl.models.sa2va.internvl import vit_features
from projects.llava_sam2_rl.utils.devices import to_host

#: A frozen encoder sees at most so many pixels at a time, so that its memory has a bound whatever
#: the batch: 83 tiles of 448 x 448, or 16 images of 1024 x 1024.
PIXELS_AT_A_TIME = 16 * 1024**2


@dataclass(frozen=True)
class ImageFeatures:
    """What the frozen encoders know of N images; shared by every pass over them.

    Args:
        vit: ``(ΣT, L, C)`` InternViT features of all tiles before the (trainable) projector.
        num_tiles: Tiles of each image; sums to ΣT.
        vp_mask: ``(ΣT,)`` bool, the tile of each image that regions are pooled from.
        sam: SAM 2's features of the N images, or ``None`` where no mask is wanted.
        of_clips: Whether the tiles of an image are the frames of a clip, which prompts hold as an
            image each. Defaults to False.
    """

    vit: Tensor
    num_tiles: tuple[int, ...]
    vp_mask: Tensor | None
    sam: SamFeatures | None
    of_clips: bool = False

    def __len__(self) -> int:
        return len(self.num_tiles)

    @cached_property
    def vp_flags(self) -> list[bool] | None:
        """``vp_mask`` on the host, for which a GPU is waited for once."""
        return None if self.vp_mask is None else self.vp_mask.tolist()

    def tiles_of(self, image: int) -> slice:
        """Where the tiles of an image stand among all."""
        start = sum(self.num_tiles[:image])
        return slice(start, start + self.num_tiles[image])


def encode_images(
    vision_model: InternViT,
    grounding_encoder: GroundingEncoder | None,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
) -> ImageFeatures:
    """Runs the encoders, once for every image of ``data``; see `VideoLLaVASAMModel.encode_images`.

    Args:
        vision_model: InternViT.
        grounding_encoder: ``None`` where no mask is wanted.
        config: Of the model.
        data: Of an official batch.
    """
    pixels = [x.unsqueeze(0) if x.ndim == 3 else x for x in data['pixel_values']]
    tiles = torch.cat(list(pixels)).to(dtype_of(vision_model))
    vp_mask = data.get('vp_overall_mask')
    if vp_mask is not None:
        vp_mask = torch.as_tensor(vp_mask, device=tiles.device).bool().flatten()
        if len(vp_mask) != len(tiles):
            raise ValueError(f'vp_overall_mask has {len(vp_mask)} flags for {len(tiles)} tiles')
    side = config['force_image_size']
    if tiles.shape[-2:] != (side, side):
        raise ValueError(
            f'pixel_values are tiles of {tuple(tiles.shape[-2:])} pixels, this model takes '
            f'{(side, side)}: leave sizes out of the transform, or give it image_size={side}'
        )
    # The official batch gives a text-only sample one tile of zeros.
    real = tiles.flatten(1).any(dim=1)
    counts = [int(n) for n in to_host([x.sum() for x in real.split([len(x) for x in pixels])])]
    with _gradient_where_trained(vision_model):
        vit = _in_parts(
            partial(
                vit_features,
                vision_model,
                select_layer=config['select_layer'],
                downsample_ratio=config['downsample_ratio'],
                ps_version=config['ps_version'],
            ),
            tiles[real],
        )
    sam = None
    if grounding_encoder is not None and data.get('g_pixel_values') is not None:
        with _gradient_where_trained(grounding_encoder.sam2_model.image_encoder):
            parts = _parts(torch.stack(list(data['g_pixel_values'])))
            found = [grounding_encoder.encode(part) for part in parts]
            sam = found[0] if len(found) == 1 else SamFeatures.joined(found)
    return ImageFeatures(vit, tuple(counts), None if vp_mask is None else vp_mask[real], sam)


def _parts(images: Tensor) -> tuple[Tensor, ...]:
    """Images in parts of at most `PIXELS_AT_A_TIME`, where no gradient needs them all at once."""
    at_a_time = max(1, PIXELS_AT_A_TIME // images.shape[-1] ** 2)
    return (images,) if torch.is_grad_enabled() else images.split(at_a_time) or (images,)


def _in_parts(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    parts = _parts(images)
    return encode(images) if len(parts) == 1 else torch.cat([encode(part) for part in parts])


@contextmanager
def _gradient_where_trained(module: nn.Module) -> Iterator[None]:
    """A frozen encoder keeps no graph: none of its inputs has a gradient either."""
    trained = any(p.requires_grad for p in module.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
        yield
