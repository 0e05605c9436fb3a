"""Regions as people write them down: rows, masks in any of the usual forms, one of the captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.datasets.records import (
    decode_mask,
    decode_rle,
    file_below,
    fit_mask,
    polygons_to_mask,
    read_mask,
)
from projects.llava_sam2_rl.structures import RegionSample

#: Reads a picture, given the rows and columns that its mask was made for, or ``None``.
ReadImage = Callable[[tuple[int, int] | None], np.ndarray]


def region_sample(
    row: Mapping[str, Any],
    read_frame: Callable[[str], tuple[np.ndarray, np.ndarray]],
    rng: np.random.Generator,
    source: str,
    sample_id: str,
) -> RegionSample:
    """The record in a row ``image, mask, caption, image2, mask2, category``.

    Args:
        row: All but the first two may be ``None`` or absent.
        read_frame: Reads a picture and its mask; asked for ``''``, and for ``'2'`` where there is a
            second picture.
        rng: Draws one of several captions.
        source: Name of the data source.
        sample_id: Name of the row.

    Raises:
        BadRecord: ``bad_pair``, or as `draw_caption` and ``read_frame``.
    """
    name = f'{source}/{sample_id}'
    image, mask = read_frame('')
    image2 = mask2 = None
    if (row.get('image2') is None) != (row.get('mask2') is None):
        raise BadRecord('bad_pair', name, 'image2 and mask2 come together or not at all')
    if row.get('image2') is not None:
        image2, mask2 = read_frame('2')
    category = row.get('category')
    return RegionSample(
        image=image,
        mask=mask,
        caption=draw_caption(row.get('caption'), rng, name),
        image2=image2,
        mask2=mask2,
        source=source,
        sample_id=sample_id,
        category=category if isinstance(category, str) else None,
    )


def read_region(
    read_image: ReadImage, value: Any, mask_dir: Path, record: str
) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its mask at the picture's size.

    Args:
        read_image: Reads the picture.
        value: The mask: a file name (all that is not black belongs to it), the bytes of an encoded
            picture or Hugging Face's ``{bytes, path}`` of one, a COCO run-length code ``{size,
            counts}``, or outlines in pixels of the picture: ``[x1, y1, x2, y2, …]``, ``[[x1, y1],
            [x2, y2], …]``, or a list of several, which are united.
        mask_dir: Folder that file names are below.
        record: ``source/sample_id`` for messages.

    Returns:
        (H, W, 3) uint8 and (H, W) bool.

    Raises:
        BadRecord: ``missing_mask``, ``bad_mask`` for anything else, ``unsafe_path``,
            ``corrupt_mask``, ``mask_too_large``, ``bad_rle``, ``bad_polygon``, ``mask_aspect``.
    """
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        image = read_image(None)
        height, width = image.shape[:2]
        return image, polygons_to_mask(_polygons(value), height, width, record)
    mask = _stored(value, mask_dir, record)
    image = read_image((mask.shape[0], mask.shape[1]))
    return image, fit_mask(mask, image, record)


def _stored(value: Any, mask_dir: Path, record: str) -> np.ndarray:
    """A mask that brings its own size."""
    if isinstance(value, Mapping) and 'counts' in value:
        return decode_rle(value, record)
    if isinstance(value, Mapping) and ('bytes' in value or 'path' in value):
        value = value.get('bytes') or value.get('path')
    if value is None or value == '':
        raise BadRecord('missing_mask', record)
    if isinstance(value, bytes):
        return decode_mask(value, record)
    if isinstance(value, str):
        return read_mask(file_below(mask_dir, value, record), record)
    raise BadRecord(
        'bad_mask',
        record,
        f'a {type(value).__name__}, expected a file, a run-length code or outlines',
    )


def _polygons(value: Sequence[Any]) -> Sequence[Any]:
    """A list of outlines, each a flat list or one of corners, of any of the forms."""
    if value and all(isinstance(x, (int, float)) for x in value):
        return [value]
    corners = [isinstance(x, Sequence) and len(x) == 2 and not isinstance(x, str) for x in value]
    if corners and all(corners) and all(isinstance(x, (int, float)) for x in value[0]):
        return [value]
    return value


def draw_caption(value: Any, rng: np.random.Generator, record: str) -> str | None:
    """The caption, or one of several; ``None`` where there is none.

    Args:
        value: A text, a list of texts, or ``None``. Empty ones do not count.
        rng: Draws it.
        record: ``source/sample_id`` for messages.

    Raises:
        BadRecord: ``bad_caption`` for anything else, ``bad_encoding`` where the file it comes from
            is not UTF-8 there.
    """
    texts = list(value) if isinstance(value, (list, tuple)) else [value]
    texts = [text for text in texts if text is not None]
    for text in texts:
        if not isinstance(text, str):
            raise BadRecord('bad_caption', record, f'a {type(text).__name__}: {text!r:.40}')
        if any('\udc80' <= character <= '\udcff' for character in text):
            raise BadRecord('bad_encoding', record, f'{text!r:.60} is not UTF-8')
    texts = [text for text in texts if text.strip()]
    return texts[int(rng.integers(len(texts)))] if texts else None
