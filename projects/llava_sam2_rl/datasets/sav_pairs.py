"""SA-V as pairs of frames, one ``.npz`` file per object."""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

ARRAYS = ('frame1', 'mask1', 'frame2', 'mask2')
PREFIX, SUFFIX = 'masklet_data_', '.npz'
#: Longest side of an array that is read. The files hold 512 x 512; a file that claims much more
#: is damaged, or made to fill the memory.
MAX_SIDE = 2048
MAX_BYTES = MAX_SIDE**2 * 3 * 8 + 4096
#: numpy parses the header as Python source; what damaged source may raise, beside ValueError.
_HEADER_ERRORS = (
    *(SyntaxError, tokenize.TokenError, TypeError, KeyError, IndexError, AttributeError),
    *(RecursionError, MemoryError, OverflowError),
)
_DTYPES = ('float16', 'float32', 'float64', 'uint8', 'bool')


@DATASETS.register_module()
class SAVPairsDataset(RegionDataset):
    """One record per ``masklet_data_*.npz`` below ``data_root``, at any depth, in sorted order.

    A file holds one object in two frames: ``frame1`` and ``frame2`` (H, W, 3), 0 to 255, **BGR**;
    ``mask1`` and ``mask2`` (H, W), 0 or 255. The frames were squashed to a square when the files
    were made, so shapes in them are not true; there are no captions and no classes.

    Args:
        data_root: Folder of the files.
        bgr: Whether the frames are stored blue first.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: There is no such file.
    """

    def __init__(
        self,
        data_root: str,
        bgr: bool = True,
        source: str = 'sav_pairs',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        self.data_root = Path(data_root)
        self.bgr = bgr
        # Bytes in one array: a tenth of the memory of as many strings, and shared by workers.
        self._names = np.array(sorted(_find(self.data_root)), dtype=np.bytes_)
        if not len(self._names):
            raise FileNotFoundError(
                f'{self.data_root} holds no {PREFIX}*{SUFFIX}, at any depth: point data_root at '
                'the folder of the SA-V pairs'
            )

    @property
    def num_records(self) -> int:
        """Files."""
        return len(self._names)

    def _name(self, index: int) -> str:
        return os.fsdecode(bytes(self._names[index]))

    def sample_id(self, index: int) -> str:
        """The file's path below ``data_root``, without its ending."""
        return self._name(index).removesuffix(SUFFIX)

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads a file.

        Raises:
            BadRecord: ``missing_file``, ``corrupt_npz``, ``missing_array``, ``bad_array`` (shape,
                type or size), ``bad_values`` (not 0 to 255) or ``empty_mask``.
        """
        name = f'{self.source}/{self.sample_id(index)}'
        arrays = read_pair_arrays(self.data_root / self._name(index), name)
        frames = [_pixels(arrays[key], self.bgr, f'{name} {key}') for key in ('frame1', 'frame2')]
        masks = [_mask(arrays[key], f'{name} {key}') for key in ('mask1', 'mask2')]
        empty = [key for key, mask in zip(('mask1', 'mask2'), masks) if not mask.any()]
        if empty:
            raise BadRecord('empty_mask', name, ' and '.join(empty))
        return RegionSample(
            image=frames[0],
            mask=masks[0],
            image2=frames[1],
            mask2=masks[1],
            source=self.source,
            sample_id=self.sample_id(index),
        )


def _find(root: Path) -> list[bytes]:
    found = []
    for folder, _, files in os.walk(root):
        below = os.path.relpath(folder, root)
        found += [
            os.fsencode(file if below == '.' else os.path.join(below, file))
            for file in files
            if file.startswith(PREFIX) and file.endswith(SUFFIX)
        ]
    return found


def read_pair_arrays(path: Path, record: str) -> dict[str, np.ndarray]:
    """The four arrays of a file, as they are stored.

    Every array's header is looked at before a byte of any is decompressed.

    Raises:
        BadRecord: ``missing_file``, ``corrupt_npz``, ``missing_array`` or ``bad_array``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {key: _check_header(archive, key, record) for key in ARRAYS}
            for number in '12':
                if shapes[f'frame{number}'] != shapes[f'mask{number}']:
                    raise BadRecord(
                        'bad_array',
                        record,
                        f'frame{number} is {shapes[f"frame{number}"]}, '
                        f'mask{number} {shapes[f"mask{number}"]} (rows, columns)',
                    )
            arrays = {}
            for key in ARRAYS:
                with archive.open(f'{key}.npy') as file:
                    arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
            return arrays
    except FileNotFoundError as error:
        raise BadRecord('missing_file', record, str(path)) from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        ValueError,  # of numpy
        NotImplementedError,  # of zipfile: a compression it does not know
        RuntimeError,  # of zipfile: encrypted
    ) as error:
        raise BadRecord('corrupt_npz', record, f'{path}: {error}') from error


def _check_header(archive: zipfile.ZipFile, key: str, record: str) -> tuple[int, int]:
    """Rows and columns of an array, after checking all that its header says."""
    try:
        member = archive.getinfo(f'{key}.npy')
    except KeyError as error:
        names = ', '.join(sorted(archive.namelist())[:8])
        raise BadRecord('missing_array', record, f'no {key}, only {names}') from error
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadRecord('corrupt_npz', record, f'{key}: compression {member.compress_type}')
    # Before the header is read, since a header may claim any length too.
    if member.file_size > MAX_BYTES:
        raise BadRecord(
            'bad_array', record, f'{key} has {member.file_size} bytes, more than {MAX_BYTES}'
        )
    with archive.open(member) as file:
        shape, dtype = _read_header(file)
        header_bytes = file.tell()
    channels = (3,) if key.startswith('frame') else ()
    wanted = '(H, W, 3)' if channels else '(H, W)'
    if dtype.name not in _DTYPES or len(shape) != 2 + len(channels) or shape[2:] != channels:
        raise BadRecord('bad_array', record, f'{key} is {shape} {dtype}, not {wanted} numbers')
    if not 0 < min(shape[:2]) <= max(shape[:2]) <= MAX_SIDE:
        raise BadRecord('bad_array', record, f'{key} is {shape}; a side has 1 to {MAX_SIDE} pixels')
    stored, needed = member.file_size - header_bytes, int(np.prod(shape)) * dtype.itemsize
    if stored != needed:
        raise BadRecord('bad_array', record, f'{key} has {stored} bytes, {shape} needs {needed}')
    return shape[0], shape[1]


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f'npy format {version}')
    try:
        shape, _, dtype = read[version](file)
    except _HEADER_ERRORS as error:
        raise ValueError(f'npy header: {error!r}') from error
    return shape, dtype


def _check_values(array: np.ndarray, record: str) -> None:
    if array.dtype.kind == 'f' and not (np.isfinite(array).all() and array.min() >= 0):
        raise BadRecord('bad_values', record, 'negative or not finite')
    if array.dtype.kind == 'f' and array.max() > 255:
        raise BadRecord('bad_values', record, f'up to {array.max()}, more than 255')


def _pixels(array: np.ndarray, bgr: bool, record: str) -> np.ndarray:
    _check_values(array, record)
    if array.dtype == np.bool_:
        raise BadRecord('bad_array', record, 'a frame of booleans')
    pixels = array if array.dtype == np.uint8 else np.rint(array).astype(np.uint8)
    return np.ascontiguousarray(pixels[..., ::-1] if bgr else pixels)


def _mask(array: np.ndarray, record: str) -> np.ndarray:
    if array.dtype == np.bool_:
        return array
    _check_values(array, record)
    return array > 127
