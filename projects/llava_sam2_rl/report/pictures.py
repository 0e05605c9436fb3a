"""Pictures of held-out regions, small enough to lie in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.utils.drawing import REGION, film_strip, found_over_truth, overlay

#: Longest side of a picture in pixels.
BOX = 320
_QUALITY = 80


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """``(h, w)`` bool -> run lengths as COCO writes them, plain enough for JSON."""
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': list(encoded['size']), 'counts': encoded['counts'].decode('ascii')}


def decode_mask(encoded: Mapping[str, Any]) -> np.ndarray:
    """Undoes :func:`encode_mask`."""
    counts = encoded['counts'].encode('ascii')
    return coco_mask.decode({'size': encoded['size'], 'counts': counts}).astype(bool)


def encode_jpeg(image: np.ndarray) -> bytes:
    """``(h, w, 3)`` uint8 -> a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format='jpeg', quality=_QUALITY, optimize=True)
    return buffer.getvalue()


def decode_jpeg(data: bytes) -> np.ndarray:
    """Undoes :func:`encode_jpeg`, but for what JPEG loses."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert('RGB'))


def data_uri(image: np.ndarray) -> Markup:
    """``(h, w, 3)`` uint8 -> ``data:image/jpeg;base64,…``."""
    encoded = base64.b64encode(encode_jpeg(image)).decode('ascii')
    return Markup('data:image/jpeg;base64,') + encoded


def asked(image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
    """The image with the region that was to be described."""
    return overlay(image, decode_mask(row['region']), REGION)


def answered(images: Mapping[str, np.ndarray], row: Mapping[str, Any]) -> np.ndarray:
    """What was found on the way back, over the outline of what was to be found.

    Args:
        images: Pictures by their names.
        row: Of a region; of a clip it becomes a film strip.
    """
    if 'clip' not in row:
        return _found(images[row['target_image']], row['found'], row['target'])
    clip = row['clip']
    frames = zip(clip['images'], clip['found'], clip['target'], strict=True)
    return film_strip([_found(images[name], found, target) for name, found, target in frames], BOX)


def _found(image: np.ndarray, found: Mapping[str, Any], target: Mapping[str, Any]) -> np.ndarray:
    return found_over_truth(image, decode_mask(found), decode_mask(target))


def picture_names(row: Mapping[str, Any]) -> list[str]:
    """The pictures that `asked` and `answered` need."""
    clip = row['clip']['images'] if 'clip' in row else []
    return [row['image'], row['target_image'], *clip]


def strip(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures side by side on white, at the height of the tallest."""
    height = max(map(len, pictures))
    return np.hstack(
        [np.pad(p, ((0, height - len(p)), (0, 4), (0, 0)), constant_values=255) for p in pictures]
    )
