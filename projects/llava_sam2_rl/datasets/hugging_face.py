"""Regions in a data set of Hugging Face's ``datasets``, saved to disk or as parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.records import decode_image, file_below, read_image
from projects.llava_sam2_rl.datasets.regions import read_region, region_sample
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

if TYPE_CHECKING:
    import datasets


@DATASETS.register_module()
class HuggingFaceRegionDataset(RegionDataset):
    """One record per row, with the columns named here.

    ``image`` is an ``Image`` column, encoded pictures or file names; ``mask`` the same, a COCO
    run-length code or outlines in pixels (`read_region`); ``caption`` a text or a list of texts, of
    which one is drawn each time.

    Args:
        data_root: What ``save_to_disk`` wrote, a parquet file, or a folder of parquet files.
        split: One of those that ``save_to_disk`` wrote together. Defaults to None: there are none.
        image: Column of the pictures. Defaults to ``'image'``.
        mask: Column of the masks. Defaults to ``'mask'``.
        caption: Column of the captions, ``None`` for no captions. Defaults to ``'caption'``.
        image2: Column of a second picture of the same object, ``None`` in rows without one.
            Defaults to None: there is none.
        mask2: Column of its mask, given together with ``image2``.
        category: Column of the object's class. Defaults to None: there is none.
        file_dir: Folder that file names in the columns are below. Defaults to ``data_root``.
        cache_dir: Where parquet files are unpacked so that rows can be read in any order, about as
            large as they are. Defaults to that of ``datasets`` (``HF_DATASETS_CACHE``).
        **kwargs: See :class:`RegionDataset`. For ``part``, rows with the same file name and size of
            their encoded picture have the same picture.

    Raises:
        FileNotFoundError: There is nothing at ``data_root``.
        ValueError: A column or a split is not there, or the data set is damaged or empty.
    """

    def __init__(
        self,
        data_root: str,
        split: str | None = None,
        image: str = 'image',
        mask: str = 'mask',
        caption: str | None = 'caption',
        image2: str | None = None,
        mask2: str | None = None,
        category: str | None = None,
        file_dir: str | None = None,
        cache_dir: str | None = None,
        source: str = 'hugging_face',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        if (image2 is None) != (mask2 is None):
            raise ValueError(f'{source}: give the columns image2 and mask2 together or not at all')
        root = Path(data_root)
        self.columns = {
            name: column
            for name, column in (
                *(('image', image), ('mask', mask), ('caption', caption)),
                *(('image2', image2), ('mask2', mask2), ('category', category)),
            )
            if column is not None
        }
        self.file_dir = Path(file_dir) if file_dir else root.parent if root.is_file() else root
        table = open_table(root, split, cache_dir)
        lost = [column for column in self.columns.values() if column not in table.column_names]
        if lost:
            raise ValueError(
                f'{data_root} has no column {", ".join(map(repr, lost))}, only '
                f'{", ".join(map(repr, table.column_names))}: name those of picture, mask and '
                "caption, as image='photo', mask='segmentation', caption=None"
            )
        if not len(table):
            raise ValueError(f'{data_root} has no rows')
        self._table = _undecoded(table.select_columns(list(dict.fromkeys(self.columns.values()))))
        self._keys: list[str] | None = None

    @property
    def num_records(self) -> int:
        """Rows."""
        return len(self._table)

    def sample_id(self, index: int) -> str:
        """The row's number, from 0."""
        return str(index)

    def image_key(self, index: int) -> str:
        """File name and encoded size of the row's picture, which are known without reading it."""
        if self._keys is None:
            pictures = self._table.select_columns([self.columns['image']]).with_format('arrow')
            self._keys = [key for part in pictures.iter(1000) for key in _keys(part.column(0))]
        return self._keys[index]

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads a row.

        Raises:
            BadRecord: ``corrupt_row``, ``bad_encoding``, or as `region_sample`, `read_region` and
                `read_image`.
        """
        name = f'{self.source}/{index}'
        try:
            values = self._table[index]
        except UnicodeDecodeError as error:
            raise BadRecord('bad_encoding', name, str(error)) from error
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise BadRecord('corrupt_row', name, str(error)) from error
        row = {key: values[column] for key, column in self.columns.items()}
        return region_sample(
            row, lambda suffix: self._frame(row, suffix, name), rng, self.source, str(index)
        )

    def _frame(
        self, row: Mapping[str, Any], suffix: str, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        value = row[f'image{suffix}']
        if isinstance(value, Mapping):
            value = value.get('bytes') or value.get('path')

        def read(size: tuple[int, int] | None) -> np.ndarray:
            if isinstance(value, bytes):
                return decode_image(value, name, size)
            if isinstance(value, str):
                return read_image(file_below(self.file_dir, value, name), name, size)
            raise BadRecord(
                'missing_image',
                name,
                f'column {self.columns[f"image{suffix}"]!r} has {value!r:.40}',
            )

        return read_region(read, row[f'mask{suffix}'], self.file_dir, name)


def _keys(pictures: pa.ChunkedArray) -> list[str]:
    """Names of the pictures of a column."""
    columns = [pictures]
    if pa.types.is_struct(pictures.type):
        names = {field.name for field in pictures.type}
        columns = [
            pa.compute.struct_field(pictures, name) for name in ('path', 'bytes') if name in names
        ]
    values = [pa.compute.binary_length(c) if pa.types.is_binary(c.type) else c for c in columns]
    return [str(key) for key in zip(*(value.to_pylist() for value in values), strict=True)]


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return any((folder / name).is_file() for name in ('state.json', 'dataset_dict.json'))


def open_table(root: Path, split: str | None, cache_dir: str | None) -> datasets.Dataset:
    """The data set at a place.

    Raises:
        FileNotFoundError: There is nothing there that `HuggingFaceRegionDataset` reads.
        ValueError: It is damaged, or has other splits.
    """
    # Two seconds and much memory, for sources of this kind only.
    import datasets

    files = [root] if root.suffix == '.parquet' else sorted(root.rglob('*.parquet'))
    saved = is_saved(root)
    if not saved and not (files and files[0].is_file()):
        raise FileNotFoundError(
            f'{root} is neither a parquet file, nor a folder with some, nor what save_to_disk wrote'
        )
    try:
        if saved:
            table = datasets.load_from_disk(str(root))
        else:
            table = datasets.Dataset.from_parquet(
                [str(file) for file in files], cache_dir=cache_dir
            )
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{root} cannot be read: {error}') from error
    # What `datasets` makes of an error in a file.
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f'{root} cannot be read: {error.__cause__ or error}') from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise ValueError(
                f'{root} has the splits {", ".join(map(repr, table))}, split is {split!r}'
            )
        return table[split]
    if split is not None:
        raise ValueError(f'{root} has no splits, split is {split!r}: leave it out')
    return table


def _undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """The data set with pictures as they are stored: this package decodes them itself."""
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table
