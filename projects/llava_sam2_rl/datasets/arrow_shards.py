"""Arrow shards as ``datasets`` writes them, memory-mapped, and the region records in their rows."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from mmengine.logging import print_log

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.datasets.captions import category_name, draw_text, region_texts
from projects.llava_sam2_rl.datasets.index_cache import cached_index
from projects.llava_sam2_rl.datasets.records import (
    decode_image,
    decode_rle,
    fit_mask,
    path_inside,
    read_image,
)
from projects.llava_sam2_rl.structures import RegionSample

#: Columns of a region record; the second spelling of the class is the Grasp-Any-Region one.
COLUMNS = ('image', 'mask_rle', 'caption', 'conversations', 'category', 'catagory', 'image_id')
_OF_HOW_MANY = re.compile(r'-of-(\d+)\.arrow$')
_FILE_MAGIC = b'ARROW1'


def find_shards(folders: Sequence[Path]) -> list[Path]:
    """The ``*.arrow`` files below folders, sorted; says in the log where some are not there yet."""
    shards: list[Path] = []
    for folder in folders:
        found = sorted(folder.rglob('*.arrow'))
        shards += found
        by_folder: dict[Path, list[Path]] = {}
        for path in found:
            by_folder.setdefault(path.parent, []).append(path)
        for parent, paths in by_folder.items():
            wanted = {int(match.group(1)) for path in paths if (match := _number_of(path))}
            if len(wanted) == 1 and len(paths) < max(wanted):
                print_log(f'{parent}: {len(paths)} of {max(wanted)} shards are there', 'current')
    return shards


def _number_of(path: Path) -> re.Match[str] | None:
    return _OF_HOW_MANY.search(path.name)


class ArrowShards:
    """The rows of several shards, by one number.

    Shards are opened when a row of theirs is first read; their bytes stay in the file until then.
    Of a shard that is cut short the rows before the cut are there, and one row more that cannot
    be read, so that the damage is counted.

    Args:
        paths: Shards, at least one.
        name: Of the index.
        required: Column whose ``null`` rows are left out; ``None`` takes all rows.
        cache_dir: Folder of the index.
    """

    def __init__(
        self, paths: Sequence[Path], name: str, required: str | None, cache_dir: str | None
    ) -> None:
        self.paths = list(paths)
        self._index = cached_index(
            self.paths,
            lambda: _index_rows(self.paths, required),
            f'{name}-{required or "all"}',
            cache_dir,
        )
        self._opened: dict[int, tuple[list[pa.RecordBatch], np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._index['row'])

    def __getstate__(self) -> dict[str, Any]:
        # Batches would be pickled with all the bytes that they map.
        return {**self.__dict__, '_opened': {}}

    def place(self, number: int) -> tuple[int, int]:
        """Shard and row in it of the row ``number``; row -1 is the part that cannot be read."""
        return int(self._index['shard'][number]), int(self._index['row'][number])

    def read(self, number: int, columns: Sequence[str], record: str) -> dict[str, Any]:
        """A row as Python objects: those of ``columns`` that the shard has.

        Raises:
            BadRecord: ``corrupt_shard`` or ``missing_shard``.
        """
        shard, row = self.place(number)
        path = self.paths[shard]
        if row < 0:
            raise BadRecord('corrupt_shard', record, f'{path} is cut short or damaged')
        try:
            if shard not in self._opened:
                batches, _ = read_batches(path)
                ends = np.cumsum([batch.num_rows for batch in batches])
                self._opened[shard] = batches, ends
            batches, ends = self._opened[shard]
            which = int(np.searchsorted(ends, row, side='right'))
            batch = batches[which]
            chosen = batch.select([name for name in batch.schema.names if name in columns])
            line = chosen.slice(row - int(ends[which]) + batch.num_rows, 1)
            # What the file says about where a value lies is not to be trusted.
            line.validate(full=True)
            return line.to_pylist()[0]
        except FileNotFoundError as error:
            raise BadRecord('missing_shard', record, str(path)) from error
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise BadRecord('corrupt_shard', record, f'{path}: {error}') from error


def read_batches(path: Path) -> tuple[list[pa.RecordBatch], Exception | None]:
    """The batches of a shard (stream or file format), mapped, and what ended them too early."""
    batches: list[pa.RecordBatch] = []
    try:
        with pa.memory_map(str(path)) as file:
            if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
                reader = pa.ipc.open_file(file)
                for number in range(reader.num_record_batches):
                    batches.append(_sized(reader.get_batch(number)))
            else:
                file.seek(0)
                for batch in pa.ipc.open_stream(file):
                    batches.append(_sized(batch))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        return batches, error
    return batches, None


def _sized(batch: pa.RecordBatch) -> pa.RecordBatch:
    # Checks the sizes of the buffers against the number of rows, without looking into them.
    batch.validate()
    names = batch.schema.names
    if len(set(names)) != len(names):
        raise ValueError(f'columns {names}')
    return batch


def _index_rows(paths: Sequence[Path], required: str | None) -> dict[str, np.ndarray]:
    shards, rows = [], []
    for shard, path in enumerate(paths):
        batches, error = read_batches(path)
        start, found = 0, [np.zeros(0, dtype=np.int64)]
        for batch in batches:
            if required is None or required not in batch.schema.names:
                here = np.arange(batch.num_rows)
            else:
                valid = batch.column(required).is_valid().to_numpy(zero_copy_only=False)
                here = np.flatnonzero(valid)
            found.append(start + here)
            start += batch.num_rows
        if error is not None:
            found.append(np.array([-1]))
            print_log(
                f'{path} is cut short or damaged after {start} rows ({error}): download it again',
                logger='current',
                level=logging.WARNING,
            )
        rows.append(np.concatenate(found))
        shards.append(np.full(len(rows[-1]), shard))
    return {
        'shard': np.concatenate(shards).astype(np.int32),
        'row': np.concatenate(rows).astype(np.int32),
    }


def region_row_sample(
    row: Mapping[str, Any],
    root: Path,
    source: str,
    sample_id: str,
    max_regions: int,
    rng: np.random.Generator,
) -> RegionSample:
    """The record in a row with :data:`COLUMNS`.

    ``mask_rle`` is one run-length code or a list of them; ``null`` means the whole image. See
    :mod:`~projects.llava_sam2_rl.datasets.captions` for what the text speaks of.

    Raises:
        BadRecord: ``missing_image``, ``corrupt_image``, ``image_too_large``, ``unsafe_path``,
            ``missing_mask``, ``bad_rle``, ``mask_too_large``, ``mask_aspect``, ``empty_mask``,
            ``too_many_regions``, ``bad_caption`` or ``bad_prompt_index``.
    """
    name = f'{source}/{sample_id}'
    codes = row.get('mask_rle')
    whole = codes is None
    codes = list(codes) if isinstance(codes, (list, tuple)) else [codes]
    if not codes:
        raise BadRecord('missing_mask', name, 'an empty list')
    text, distractor = draw_text(region_texts(row, len(codes), name), rng)
    if len(text.regions) > max_regions:
        raise BadRecord(
            'too_many_regions', name, f'{len(text.regions)} regions, max_regions is {max_regions}'
        )
    masks = [] if whole else [_mask(codes[region], name) for region in text.regions]
    annotated = (masks[0].shape[0], masks[0].shape[1]) if masks else None
    image = _picture(row.get('image'), root, name, annotated)
    masks = [fit_mask(mask, image, name) for mask in masks]
    if whole:
        masks = [np.ones(image.shape[:2], dtype=bool)]
    return RegionSample(
        image=image,
        mask=masks[0] if len(masks) == 1 else np.stack(masks),
        caption=text.caption,
        source=source,
        sample_id=sample_id,
        category=category_name(row.get('category') or row.get('catagory')),
        distractor=distractor,
    )


def _mask(code: Any, name: str) -> np.ndarray:
    if code is None:
        raise BadRecord('missing_mask', name)
    mask = decode_rle(code, name)
    if not mask.any():
        raise BadRecord('empty_mask', name)
    return mask


def _picture(value: Any, root: Path, name: str, annotated: tuple[int, int] | None) -> np.ndarray:
    """The picture of a cell of the image column: encoded there, or a file below ``root``."""
    path = value
    if isinstance(value, Mapping):
        path, value = value.get('path'), value.get('bytes')
    if isinstance(value, bytes):
        return decode_image(value, name, annotated)
    if not isinstance(path, str):
        raise BadRecord('missing_image', name, f'the image column holds a {type(value).__name__}')
    return read_image(path_inside(root, path, name), name, annotated)
