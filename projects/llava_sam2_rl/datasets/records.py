"""Reading the parts of a record: pictures and masks, and what makes them bad."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets.base import BadRecord

#: How far the aspects of a mask and its image may differ. A resized mask is off by rounding only.
ASPECT_TOLERANCE = 0.02


def path_inside(root: Path, name: str, record: str) -> Path:
    """``root / name`` for a file name that comes from an annotation.

    Raises:
        BadRecord: ``unsafe_path``, where the name is absolute or climbs out of ``root``.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or posix.is_absolute() or windows.drive or windows.root or '..' in windows.parts:
        raise BadRecord('unsafe_path', record, f'file name {name!r} leaves {root}')
    return root / name


def read_image(path: Path, record: str) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB; transparency is dropped, EXIF orientation not applied
    (annotations refer to the stored pixels).

    Raises:
        BadRecord: ``missing_image``, ``corrupt_image``, or ``image_too_large`` beyond
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            # PIL itself refuses at twice the limit only, and warns below.
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return np.array(picture.convert('RGB'))
    except FileNotFoundError as error:
        raise BadRecord('missing_image', record, str(path)) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadRecord('image_too_large', record, f'{path}: {error}') from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        # PIL's decoders raise all four on broken files.
        raise BadRecord('corrupt_image', record, f'{path}: {error}') from error


def decode_rle(rle: Mapping[str, Any], record: str) -> np.ndarray:
    """A COCO run-length code, compressed or not, as (H, W) bool.

    Raises:
        BadRecord: ``bad_rle``, where it does not decode or its runs do not fill its size.
    """
    try:
        height, width = (int(side) for side in rle['size'])
        counts = rle['counts']
        if height < 1 or width < 1:
            raise ValueError(f'size {height} x {width}')
        if isinstance(counts, (str, bytes)):
            code = {'size': [height, width], 'counts': _checked_counts(counts, height * width)}
        else:
            runs = [int(run) for run in counts]
            if any(run < 0 for run in runs) or sum(runs) != height * width:
                raise ValueError(f'runs sum to {sum(runs)}, the size is {height} x {width}')
            code = coco_mask.frPyObjects({'size': [height, width], 'counts': runs}, height, width)
        return coco_mask.decode(code).astype(bool)
    except (KeyError, TypeError, ValueError, UnicodeError) as error:
        raise BadRecord('bad_rle', record, str(error)) from error


def _checked_counts(counts: str | bytes, pixels: int) -> bytes:
    """Compressed counts as bytes, after checking that they fill the image exactly.

    pycocotools reads past its buffers on a code that is cut short or too long. Format: see
    ``rleFrString`` of the COCO API; each run is a signed number in groups of five bits, from the
    fourth run on relative to the run before the last.
    """
    code = counts.encode('ascii') if isinstance(counts, str) else bytes(counts)
    runs: list[int] = []
    at = 0
    while at < len(code):
        value, shift, more = 0, 0, True
        while more:
            if at >= len(code):
                raise ValueError('the run-length code is cut short')
            group = code[at] - 48
            if not 0 <= group < 64 or shift > 60:
                raise ValueError(f'the run-length code holds the byte {code[at]}')
            value |= (group & 0x1F) << shift
            more = bool(group & 0x20)
            at += 1
            shift += 5
            if not more and group & 0x10:
                value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            raise ValueError(f'the run-length code holds a run of {value}')
        runs.append(value)
    if sum(runs) != pixels:
        raise ValueError(f'runs sum to {sum(runs)}, the size has {pixels} pixels')
    return code


def polygons_to_mask(
    polygons: Sequence[Sequence[float]], height: int, width: int, record: str
) -> np.ndarray:
    """The union of COCO polygons ``[x0, y0, x1, y1, ...]`` as (H, W) bool.

    Raises:
        BadRecord: ``bad_polygon``, for fewer than three corners or an odd count of numbers.
    """
    outlines = [np.asarray(polygon, dtype=np.float64).ravel() for polygon in polygons]
    for outline in outlines:
        if outline.size < 6 or outline.size % 2 or not np.isfinite(outline).all():
            raise BadRecord('bad_polygon', record, f'{outline.size} numbers')
    if not outlines:
        return np.zeros((height, width), dtype=bool)
    codes = coco_mask.frPyObjects([outline.tolist() for outline in outlines], height, width)
    return coco_mask.decode(coco_mask.merge(codes)).astype(bool)


def segmentation_to_mask(segmentation: Any, height: int, width: int, record: str) -> np.ndarray:
    """A COCO ``segmentation`` (polygons or either form of RLE) as bool mask.

    A run-length code brings its own size; polygons are drawn at (height, width).

    Raises:
        BadRecord: ``bad_rle`` or ``bad_polygon``.
    """
    if isinstance(segmentation, Mapping):
        return decode_rle(segmentation, record)
    return polygons_to_mask(segmentation, height, width, record)


def fit_mask(mask: np.ndarray, height: int, width: int, record: str) -> np.ndarray:
    """A mask brought to its image's size, nearest.

    Raises:
        BadRecord: ``mask_aspect``, where it has another aspect than the image.
    """
    if mask.shape == (height, width):
        return mask
    aspect, wanted = mask.shape[1] / mask.shape[0], width / height
    if abs(aspect / wanted - 1) > ASPECT_TOLERANCE:
        raise BadRecord(
            'mask_aspect', record, f'mask {mask.shape}, image {(height, width)} (rows, columns)'
        )
    resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return resized.astype(bool)
