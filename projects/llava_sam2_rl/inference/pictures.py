"""Photographs and masks as people have them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.datasets.records import read_mask

Picture: TypeAlias = str | Path | Image.Image | np.ndarray


def load_image(image: Picture) -> np.ndarray:
    """A photograph as people see it: turned as EXIF says, on white where it is transparent.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        ValueError: The file cannot be read, or the array is of another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f'an image must be (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}'
            )
        return image
    if isinstance(image, Image.Image):
        return _shown(image, 'the image')
    return read_image(image, str(image))


def read_image(file: str | Path | BinaryIO, name: str) -> np.ndarray:
    """`load_image` of a file that may be open already.

    Args:
        file: Its path, or what its bytes are read from.
        name: What messages call it.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with Image.open(file) as picture:
            return _shown(picture, name)
    except FileNotFoundError as error:
        raise ValueError(f'there is no image {name}') from error
    except Image.DecompressionBombError as error:
        raise ValueError(f'{name} is too large: {error}') from error
    except UnidentifiedImageError as error:
        raise ValueError(f'{name} is damaged or no image: Pillow knows no such format') from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f'{name} is damaged or no image: {error}') from error


def _shown(picture: Image.Image, name: str) -> np.ndarray:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith('I;16') or (picture.mode == 'I' and picture.format == 'PNG'):
        # PIL would clip at 255.
        values = np.asarray(picture).astype(np.uint32) * 255 // 65535
        return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode in ('I', 'F'):
        raise ValueError(f'{name} has 32 bits a channel: save it with 8 or 16')
    if picture.has_transparency_data:
        picture = picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
    return np.array(picture.convert('RGB'))


def load_mask(mask: Picture) -> np.ndarray:
    """A mask as ``(H, W)`` bool: all that is not black.

    Raises:
        ValueError: The file cannot be read, or the array is of another shape.
    """
    if isinstance(mask, str | Path):
        try:
            return read_mask(Path(mask), str(mask))
        except BadRecord as error:
            raise ValueError(f'the mask {mask} cannot be read ({error.detail})') from error
    array = np.asarray(mask)
    if isinstance(mask, Image.Image) and array.ndim == 3:
        array = np.asarray(mask.convert('RGB')).max(axis=2)
    if array.ndim != 2 or not array.size:
        raise ValueError(f'a mask must be (H, W), got {array.shape}')
    return array > 0
