"""OpenImages V7 segmentation: one mask file per object, no captions."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.index_cache import cached_index
from projects.llava_sam2_rl.datasets.records import (
    fit_mask,
    path_inside,
    read_image,
    read_mask,
    required_file,
)
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

SPLITS = ('train', 'validation', 'test')
COLUMNS = ('MaskPath', 'ImageID', 'LabelName')
CLASSES = 'oidv7-class-descriptions.csv'
_DOWNLOAD = (
    'download it from https://storage.googleapis.com/openimages/web/download_v7.html and point '
    'data_root at its folder'
)
#: Where the files of a split may lie below ``data_root``: the original layout, then what the
#: official archives extract to (masks come in 16 archives by the first character of the name).
IMAGE_FOLDERS = ('images/{split}', '{split}', 'images', '.')
MASK_FOLDERS = (
    'masks/{split}',
    '{split}-masks',
    'masks/{split}-masks-{first}',
    '{split}-masks-{first}',
    'masks',
    '.',
)


@DATASETS.register_module()
class OpenImagesDataset(RegionDataset):
    """One record per annotated object, with its class as ``category``.

    Layout: ``{data_root}/{split}-annotations-object-segmentation.csv``, images
    ``{ImageID}.jpg`` and masks ``{MaskPath}`` in one of :data:`IMAGE_FOLDERS` and
    :data:`MASK_FOLDERS`. Masks differ in size from their images and are resized, nearest.

    The rows become fixed-width arrays once (see :func:`cached_index`), which every process maps.

    Args:
        data_root: Folder of the annotations.
        split: ``'train'``, ``'validation'`` or ``'test'``.
        image_dir: Folder of the images, absolute or below ``data_root``; found by itself where
            ``None``.
        mask_dir: Folder of the masks, likewise.
        cache_dir: Folder of the index, see :func:`cached_index`.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: An annotation file or folder is not there.
        ValueError: Unknown split, or the annotations lack a column or any row.
    """

    def __init__(
        self,
        data_root: str,
        split: str = 'train',
        image_dir: str | None = None,
        mask_dir: str | None = None,
        cache_dir: str | None = None,
        source: str = 'openimages',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        if split not in SPLITS:
            raise ValueError(f'{source}: split must be one of {SPLITS}, got {split!r}')
        root = Path(data_root)
        rows = required_file(root / f'{split}-annotations-object-segmentation.csv', _DOWNLOAD)
        names = _class_names(required_file(root / CLASSES, _DOWNLOAD))
        self.image_dirs = _folders(root, image_dir, IMAGE_FOLDERS, split)
        self.mask_dirs = _folders(root, mask_dir, MASK_FOLDERS, split)
        self._index = cached_index(
            [rows], lambda: index_rows(rows), f'openimages-{split}', cache_dir
        )
        if not self.num_records:
            raise ValueError(f'{rows} holds no row')
        self._names = [names.get(label.decode()) for label in self._index['labels'].tolist()]

    @property
    def num_records(self) -> int:
        """Annotated objects."""
        return len(self._index['mask'])

    def sample_id(self, index: int) -> str:
        """``MaskPath`` without its ending: image, class and box."""
        return self._mask_name(index).removesuffix('.png')

    def _mask_name(self, index: int) -> str:
        return self._index['mask'][index].decode('utf-8', errors='replace')

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads an object; nothing about it is random."""
        mask_name = self._mask_name(index)
        image_name = self._index['image'][index].decode('utf-8', errors='replace')
        name = f'{self.source}/{self.sample_id(index)}'
        mask = read_mask(_found(self.mask_dirs, mask_name, name), name)
        path = _found(self.image_dirs, f'{image_name}.jpg', name)
        image = read_image(path, name, annotated=mask.shape)
        return RegionSample(
            image=image,
            mask=fit_mask(mask, image, name),
            source=self.source,
            sample_id=self.sample_id(index),
            category=self._names[self._index['label'][index]],
        )


def index_rows(path: Path) -> dict[str, np.ndarray]:
    """The columns of a segmentation CSV without an object per row.

    Returns:
        ``mask`` and ``image`` (N,) fixed-width bytes, ``label`` (N,) int32 codes into ``labels``,
        fixed-width bytes.

    Raises:
        ValueError: A column is missing or the file is no CSV; the message names the file.
    """
    convert = pacsv.ConvertOptions(
        column_types={
            'MaskPath': pa.binary(),
            'ImageID': pa.binary(),
            'LabelName': pa.dictionary(pa.int32(), pa.string()),
        },
        include_columns=COLUMNS,
        strings_can_be_null=False,
    )
    # Small blocks one after the other: twice the time of several threads, a third of the memory.
    read = pacsv.ReadOptions(block_size=4 << 20, use_threads=False)
    rows = _count_lines(path)
    masks, images, labels = _Column(rows), _Column(rows), _Column(rows)
    codes: dict[str, int] = {}
    try:
        for batch in pacsv.open_csv(path, read, convert_options=convert):
            masks.add(fixed_width(batch.column('MaskPath')))
            images.add(fixed_width(batch.column('ImageID')))
            block = batch.column('LabelName')
            # Codes of a block into codes of the file: one step per class, not per row.
            table = [codes.setdefault(label, len(codes)) for label in block.dictionary.to_pylist()]
            labels.add(np.asarray(table, np.int32)[block.indices.to_numpy()])
            del batch, block
            pa.default_memory_pool().release_unused()
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(f'{path}: {error} (needs the columns {", ".join(COLUMNS)})') from error
    return {
        'mask': masks.values(),
        'image': images.values(),
        'label': labels.values(),
        'labels': np.array([label.encode() for label in codes], dtype=bytes),
    }


class _Column:
    """Blocks put together where they will stay: memory that is not written to is not used."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._all = np.empty(0, np.uint8)
        self._end = 0

    def add(self, block: np.ndarray) -> None:
        if not self._end:
            self._all = np.empty(self._capacity, block.dtype)
        elif self._all.itemsize < block.itemsize:
            wider = np.empty(self._capacity, block.dtype)
            wider[: self._end] = self._all[: self._end]
            self._all = wider
        self._all[self._end : self._end + len(block)] = block
        self._end += len(block)

    def values(self) -> np.ndarray:
        return self._all[: self._end]


def _count_lines(path: Path) -> int:
    lines = 1
    with open(path, 'rb') as file:
        while block := file.read(1 << 22):
            lines += block.count(b'\n')
    return lines


def fixed_width(column: pa.Array) -> np.ndarray:
    """A column of binary values as (N,) numpy bytes of the longest one's width."""
    width = max(pc.max(pc.binary_length(column)).as_py() or 0, 1)
    if len(column) == 0:
        return np.zeros(0, f'S{width}')
    padding = pc.binary_repeat(b'\0', pc.subtract(width, pc.binary_length(column)))
    padded = pc.binary_join_element_wise(column, padding, b'')
    return np.frombuffer(
        padded.buffers()[2], dtype=f'S{width}', count=len(column), offset=padded.offset * width
    )


def _class_names(path: Path) -> dict[str, str]:
    with open(path, encoding='utf-8', newline='') as file:
        # Older releases have no header; as a class it would be harmless.
        return {row[0]: row[1] for row in csv.reader(file) if len(row) >= 2}


def _folders(root: Path, given: str | None, usual: tuple[str, ...], split: str) -> list[Path]:
    patterns = usual if given is None else (given,)
    folders = []
    for pattern in patterns:
        digits = '0123456789abcdef' if '{first}' in pattern else ' '
        folders += [root / pattern.format(split=split, first=digit) for digit in digits]
    there = [folder for folder in folders if folder.is_dir()]
    if not there:
        raise FileNotFoundError(
            f'none of the folders {", ".join(map(str, patterns))} is below {root}'
        )
    return there


def _found(folders: list[Path], name: str, record: str) -> Path:
    """The file in the first folder that has it; in the first folder where none has."""
    paths = [path_inside(folder, name, record) for folder in folders]
    if len(paths) == 1:
        return paths[0]
    for path in paths:
        try:
            if path.is_file():
                return path
        except (OSError, ValueError) as error:
            raise BadRecord('unsafe_path', record, f'file name {name!r}: {error}') from error
    return paths[0]
