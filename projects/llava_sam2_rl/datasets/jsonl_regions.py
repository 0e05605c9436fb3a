"""Regions of one's own, one JSON object each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.index_cache import cached_index
from projects.llava_sam2_rl.datasets.json_rows import JSONRows, iterate_rows, pack_rows
from projects.llava_sam2_rl.datasets.records import file_below, read_image, required_file
from projects.llava_sam2_rl.datasets.regions import read_region, region_sample
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample


@DATASETS.register_module()
class JSONLRegionDataset(RegionDataset):
    """One record per line ``{"image": …, "mask": …, "caption": …}``, or entry of a JSON list.

    ``image`` is a file name; ``mask`` a file name, a COCO run-length code or outlines in pixels of
    the picture (`read_region`); ``caption`` a text or a list of texts, of which one is drawn each
    time, or not there. ``image2`` and ``mask2``, both or none, are another picture of the same
    object. ``category`` is its class. Other keys are ignored.

    Args:
        ann_file: The file.
        image_dir: Folder that the pictures' names are below. Defaults to the folder of
            ``ann_file``. A whole path is taken where it leads below it.
        mask_dir: Folder that the masks' names are below. Defaults to ``image_dir``.
        cache_dir: Folder of the index, see `cached_index`.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no record, or is UTF-16.
    """

    def __init__(
        self,
        ann_file: str,
        image_dir: str | None = None,
        mask_dir: str | None = None,
        cache_dir: str | None = None,
        source: str = 'jsonl',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        path = required_file(
            Path(ann_file),
            'ann_file has a line {"image": …, "mask": …, "caption": …} for each region',
        )
        self.image_dir = path.parent if image_dir is None else Path(image_dir)
        self.mask_dir = self.image_dir if mask_dir is None else Path(mask_dir)
        self._rows = JSONRows(
            cached_index(
                [path], lambda: pack_rows(iterate_rows(path)), f'jsonl-{path.stem}', cache_dir
            )
        )
        if not len(self._rows):
            raise ValueError(f'{path} holds no record: write a JSON object a line')

    @property
    def num_records(self) -> int:
        """Lines that are not blank."""
        return len(self._rows)

    def sample_id(self, index: int) -> str:
        """The number of the line, or of the entry, from 1."""
        return str(self._rows.number(index))

    def image_key(self, index: int) -> str:
        """The picture's name."""
        try:
            return str(self._rows.read(index, '').get('image'))
        except BadRecord:
            return self.sample_id(index)

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads a line.

        Raises:
            BadRecord: ``bad_json``, ``bad_encoding``, or as `region_sample`, `read_region` and
                `read_image`.
        """
        sample_id = self.sample_id(index)
        name = f'{self.source}/{sample_id}'
        row = self._rows.read(index, name)
        return region_sample(
            row, lambda suffix: self._frame(row, suffix, name), rng, self.source, sample_id
        )

    def _frame(self, row: dict[str, Any], suffix: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        file_name = row.get(f'image{suffix}')
        if not isinstance(file_name, str):
            raise BadRecord('missing_image', name, f'image{suffix} is {file_name!r:.40}')
        path = file_below(self.image_dir, file_name, name)
        return read_region(
            lambda size: read_image(path, name, size), row.get(f'mask{suffix}'), self.mask_dir, name
        )
