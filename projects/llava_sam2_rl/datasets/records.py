"""Reading the parts of a record: pictures and masks, and what makes them bad."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.structures import RunLengths

#: How far the aspects of a mask and its image may differ. A resized mask is off by rounding only.
ASPECT_TOLERANCE = 0.02
#: How far outside an outline may lead, in longer sides of its image.
FARTHEST_CORNER = 10


def required_file(path: Path, advice: str) -> Path:
    """``path``, which a data source cannot do without.

    Args:
        path: An annotation file.
        advice: What to do where it is missing.

    Raises:
        FileNotFoundError: It is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not there: {advice}')
    return path


def path_inside(root: Path, name: str, record: str) -> Path:
    """``root / name`` for a file name that comes from an annotation.

    Raises:
        BadRecord: ``unsafe_path``, where the name is absolute or climbs out of ``root``.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or posix.is_absolute() or windows.drive or windows.root or '..' in windows.parts:
        raise BadRecord('unsafe_path', record, f'file name {name!r} leaves {root}')
    return root / name


def file_below(root: Path, name: str, record: str) -> Path:
    """As :func:`path_inside`, for a name that may also be a whole path that lies below ``root``.

    Raises:
        BadRecord: ``unsafe_path``.
    """
    if PurePosixPath(name).is_absolute():
        try:
            name = str(Path(name).relative_to(root.absolute()))
        except ValueError as error:
            raise BadRecord('unsafe_path', record, f'{name!r} is not below {root}') from error
    return path_inside(root, name, record)


def read_text(path: Path, record: str) -> str:
    """A text file, UTF-8 with or without a byte order mark.

    Raises:
        BadRecord: ``missing_text``; ``bad_encoding``, where it is something else.
    """
    raw = _read_bytes(path, record, 'text')
    try:
        text = raw.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise BadRecord('bad_encoding', record, f'{path} is not UTF-8: {error}') from error
    if '\0' in text:  # UTF-16 of plain letters is valid UTF-8 too.
        raise BadRecord('bad_encoding', record, f'{path} holds zero bytes: save it as UTF-8')
    return text


def read_image(path: Path, record: str, annotated: tuple[int, int] | None = None) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB; transparency is dropped, 16 bits become 8.

    Args:
        path: The file. Its content decides the format, not its name.
        record: ``source/sample_id`` for messages.
        annotated: Rows and columns the annotation was made for. Annotations refer to the stored
            pixels as a rule, so the EXIF orientation is not applied; where only the turned picture
            has the aspect of ``annotated``, it is.

    Raises:
        BadRecord: ``missing_image``, ``corrupt_image``, ``unsupported_image`` (32 bits a channel),
            or ``image_too_large`` beyond ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    raw = _read_bytes(path, record, 'image')
    return decode_image(raw, record, annotated, where=str(path))


def image_size(path: Path, record: str) -> tuple[int, int]:
    """Rows and columns of a picture as it is stored; only its head is read.

    Raises:
        BadRecord: As :func:`read_image`, as far as the head tells.
    """
    try:
        with open(path, 'rb') as file, _opened(file, record, 'image', str(path)) as picture:
            return picture.height, picture.width
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadRecord('missing_image', record, str(path)) from error
    except (OSError, ValueError) as error:
        raise BadRecord('corrupt_image', record, f'{path}: {error}') from error


def decode_image(
    raw: bytes, record: str, annotated: tuple[int, int] | None = None, where: str = 'bytes'
) -> np.ndarray:
    """As :func:`read_image`, of an encoded picture in memory."""
    with _opened(raw, record, 'image', where) as picture:
        if annotated is not None and _turned(picture, annotated):
            return np.array(ImageOps.exif_transpose(picture).convert('RGB'))
        # Same pixels at a third of the time; what is cut short (older OpenCV fills it with grey) or
        # not plain is left to PIL.
        if (
            picture.format == 'JPEG'
            and picture.mode in ('RGB', 'L')
            and raw.endswith(_END_OF_JPEG)
            and (fast := cv2.imdecode(np.frombuffer(raw, np.uint8), _CV2_AS_STORED)) is not None
            and fast.shape == (picture.height, picture.width, 3)
        ):
            return fast
        if picture.mode.startswith('I;16') or (picture.mode, picture.format) == ('I', 'PNG'):
            # PIL would clip at 255.
            values = (np.asarray(picture).astype(np.uint32) * 255 + 32767) // 65535
            return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)
        if picture.mode in ('I', 'F'):
            raise BadRecord('unsupported_image', record, f'{where}: mode {picture.mode}')
        if picture.mode == 'P' and 'transparency' in picture.info:
            # The same colours; PIL warns of the direct way.
            return np.array(picture.convert('RGBA').convert('RGB'))
        return np.array(picture.convert('RGB'))


def read_mask(path: Path, record: str) -> np.ndarray:
    """A mask picture as (H, W) bool: all that is not black, whatever the mode.

    Raises:
        BadRecord: ``missing_mask``, ``corrupt_mask`` or ``mask_too_large``.
    """
    return decode_mask(_read_bytes(path, record, 'mask'), record, str(path))


def decode_mask(raw: bytes, record: str, where: str = 'bytes') -> np.ndarray:
    """As :func:`read_mask`, of an encoded picture in memory."""
    with _opened(raw, record, 'mask', where) as picture:
        if picture.mode in ('1', 'L', 'I', 'F') or picture.mode.startswith('I;16'):
            return np.array(picture) > 0
        return np.asarray(picture.convert('RGB')).max(axis=2) > 0


_END_OF_JPEG = b'\xff\xd9'
_CV2_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_EXIF_ORIENTATION = 0x0112


def _read_bytes(path: Path, record: str, what: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadRecord(f'missing_{what}', record, str(path)) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadRecord(f'corrupt_{what}', record, f'{path}: {error}') from error


@contextmanager
def _opened(raw: bytes | BinaryIO, record: str, what: str, where: str) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            # PIL itself refuses at twice the limit only, and warns below.
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw) as picture:
                yield picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadRecord(f'{what}_too_large', record, f'{where}: {error}') from error
    except (
        *(UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, IndexError),
        *(TypeError, KeyError, struct.error, zlib.error, cv2.error),
    ) as error:
        # PIL's decoders raise any of these on broken files.
        raise BadRecord(f'corrupt_{what}', record, f'{where}: {error}') from error


def _turned(picture: Image.Image, annotated: tuple[int, int]) -> bool:
    """Whether EXIF turns the picture by a quarter, and its annotation was made after that."""
    height, width = annotated
    if min(annotated) < 1 or _same_aspect(picture.height, picture.width, height, width):
        return False
    return _same_aspect(picture.width, picture.height, height, width) and picture.getexif().get(
        _EXIF_ORIENTATION, 1
    ) in (5, 6, 7, 8)


def _same_aspect(height: int, width: int, other_height: int, other_width: int) -> bool:
    return abs(width / height * other_height / other_width - 1) <= ASPECT_TOLERANCE


def _check_size(height: int, width: int, record: str) -> None:
    if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise BadRecord(
            'mask_too_large', record, f'{height} x {width}, limit {Image.MAX_IMAGE_PIXELS} pixels'
        )


def decode_rle(rle: Mapping[str, Any], record: str) -> np.ndarray:
    """A COCO run-length code, compressed or not, as (H, W) bool.

    Raises:
        BadRecord: As :func:`checked_rle`.
    """
    return _row_major(coco_mask.decode(checked_rle(rle, record)))


def checked_rle(rle: Mapping[str, Any], record: str) -> RunLengths:
    """A COCO run-length code, compressed or not, as a compressed one that can be decoded.

    Raises:
        BadRecord: ``bad_rle``, where it does not decode or its runs do not fill its size, or
            ``mask_too_large`` beyond ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        height, width = (int(side) for side in rle['size'])
        counts = rle['counts']
        if height < 1 or width < 1:
            raise ValueError(f'size {height} x {width}')
        _check_size(height, width, record)
        if isinstance(counts, (str, bytes)):
            return {'size': [height, width], 'counts': _checked_counts(counts, height * width)}
        runs = [int(run) for run in counts]
        if any(run < 0 for run in runs) or sum(runs) != height * width:
            raise ValueError(f'runs sum to {sum(runs)}, the size is {height} x {width}')
        return coco_mask.frPyObjects({'size': [height, width], 'counts': runs}, height, width)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadRecord('bad_rle', record, str(error)) from error


def _checked_counts(counts: str | bytes, pixels: int) -> bytes:
    """Compressed counts as bytes, after checking that they fill the image exactly.

    pycocotools reads past its buffers on a code that is cut short or too long. Format: see
    ``rleFrString`` of the COCO API; each run is a signed number in groups of five bits, from the
    fourth run on relative to the run before the last.
    """
    code = counts.encode('ascii') if isinstance(counts, str) else bytes(counts)
    groups = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    if not groups.size:
        raise ValueError('the run-length code is empty')
    if groups.min() < 0 or groups.max() >= 64:
        at = int(np.flatnonzero((groups < 0) | (groups >= 64))[0])
        raise ValueError(f'the run-length code holds the byte {code[at]}')
    last = (groups & 0x20) == 0
    if not last[-1]:
        raise ValueError('the run-length code is cut short')
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    # Twelve groups hold 60 bits: no sum below can overflow before it is checked.
    if lengths.max() > 12:
        raise ValueError(f'the run-length code holds a number of {lengths.max()} digits')
    digit = np.arange(groups.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((groups & 0x1F) << (5 * digit), starts)
    runs -= np.where(groups[ends] & 0x10, 1 << (5 * lengths), 0)
    if np.abs(runs).max() > pixels:
        raise ValueError(f'the run-length code holds a run beyond the {pixels} pixels of its size')
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0:
        raise ValueError(f'the run-length code holds a run of {runs.min()}')
    if runs.sum() != pixels:
        raise ValueError(f'runs sum to {runs.sum()}, the size has {pixels} pixels')
    return code


def _row_major(mask: np.ndarray) -> np.ndarray:
    """What pycocotools decodes (uint8 0 and 1, column by column) as C-ordered bool."""
    # cv2 transposes in blocks, several times as fast as numpy's copy.
    return cv2.transpose(np.ascontiguousarray(mask.T)).view(bool)


def polygons_to_mask(
    polygons: Sequence[Sequence[float]], height: int, width: int, record: str
) -> np.ndarray:
    """The union of COCO polygons ``[x0, y0, x1, y1, ...]`` as (H, W) bool.

    Raises:
        BadRecord: ``bad_polygon``, for fewer than three corners, an odd count of numbers, corners
            far outside or something else than numbers; ``mask_too_large`` as for run-length codes.
    """
    if height < 1 or width < 1:
        raise BadRecord('bad_polygon', record, f'an image of {height} x {width} pixels')
    _check_size(height, width, record)
    try:
        outlines = [np.asarray(polygon, dtype=np.float64).ravel() for polygon in polygons]
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRecord('bad_polygon', record, str(error)) from error
    for outline in outlines:
        if outline.size < 6 or outline.size % 2 or not np.isfinite(outline).all():
            raise BadRecord('bad_polygon', record, f'{outline.size} numbers')
        # pycocotools walks along an outline in steps of a fifth of a pixel, wherever it leads.
        if np.abs(outline).max() > FARTHEST_CORNER * max(height, width):
            raise BadRecord(
                'bad_polygon',
                record,
                f'a corner at {np.abs(outline).max():.0f}, the image is {height} x {width} pixels',
            )
    if not outlines:
        return np.zeros((height, width), dtype=bool)
    codes = coco_mask.frPyObjects([outline.tolist() for outline in outlines], height, width)
    return _row_major(coco_mask.decode(coco_mask.merge(codes)))


def segmentation_to_mask(segmentation: Any, height: int, width: int, record: str) -> np.ndarray:
    """A COCO ``segmentation`` (polygons or either form of RLE) as bool mask.

    A run-length code brings its own size; polygons are drawn at (height, width).

    Raises:
        BadRecord: ``bad_rle`` or ``bad_polygon``, ``mask_too_large``, or ``bad_segmentation`` for
            anything that is neither.
    """
    if isinstance(segmentation, Mapping):
        return decode_rle(segmentation, record)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, (str, bytes)):
        raise BadRecord('bad_segmentation', record, f'a {type(segmentation).__name__}')
    return polygons_to_mask(segmentation, height, width, record)


def fit_mask(mask: np.ndarray, image: np.ndarray, record: str) -> np.ndarray:
    """A (H', W') mask brought to the size of its (H, W, 3) image, nearest.

    Raises:
        BadRecord: ``mask_aspect``, where it has another aspect than the image, or ``empty_mask``
            for a mask without pixels.
    """
    height, width = image.shape[:2]
    if mask.shape == (height, width):
        return mask
    if not mask.size:
        raise BadRecord('empty_mask', record, f'a mask of shape {mask.shape}')
    if not _same_aspect(mask.shape[0], mask.shape[1], height, width):
        raise BadRecord(
            'mask_aspect', record, f'mask {mask.shape}, image {(height, width)} (rows, columns)'
        )
    resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return resized.astype(bool)
