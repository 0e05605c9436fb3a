"""Grasp-Any-Region: regions with detailed descriptions and relations, in Arrow shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.arrow_shards import (
    COLUMNS,
    ArrowShards,
    find_shards,
    region_row_sample,
)
from projects.llava_sam2_rl.datasets.base import RegionDataset
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

PARTS = ('Seed-Dataset*', 'Fine-Grained-Dataset*', 'Relation-Dataset*')


@DATASETS.register_module()
class GraspAnyRegionDataset(RegionDataset):
    """One record per row of the shards ``{data_root}/{part}/*.arrow`` that are there.

    Columns: ``image`` (``{bytes, path}``), ``mask_rle`` (a run-length code, a list of them, or
    ``null``), ``conversations``, ``catagory`` (so spelled). Where a row holds several masks, what
    its text names decides which of them the record has; see
    :mod:`~projects.llava_sam2_rl.datasets.captions`.

    Args:
        data_root: Folder of the parts.
        parts: Names of the parts' folders, ``*`` for any characters.
        whole_images: Takes rows without masks too, as descriptions of the whole image; otherwise
            they are left out.
        max_regions: Rows whose text speaks of more regions are bad records.
        cache_dir: Folder of the index; see
            :func:`~projects.llava_sam2_rl.datasets.index_cache.cached_index`.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: No shard of these parts is there.
    """

    def __init__(
        self,
        data_root: str,
        parts: Sequence[str] = PARTS,
        whole_images: bool = False,
        max_regions: int = 16,
        cache_dir: str | None = None,
        source: str = 'grasp_any_region',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        self.data_root = Path(data_root)
        self.max_regions = max_regions
        folders = sorted({folder for part in parts for folder in self.data_root.glob(part)})
        paths = find_shards(folders)
        if not paths:
            raise FileNotFoundError(
                f'{self.data_root} holds no *.arrow in {", ".join(parts)}: download shards of '
                'HaochenWang/Grasp-Any-Region-Dataset there, or correct data_root and parts'
            )
        self._shards = ArrowShards(
            paths,
            'grasp_any_region',
            None if whole_images else 'mask_rle',
            cache_dir,
        )

    @property
    def num_records(self) -> int:
        """Rows with a mask, or all rows with ``whole_images``."""
        return len(self._shards)

    def sample_id(self, index: int) -> str:
        """``part/shard/row``."""
        shard, row = self._shards.place(index)
        path = self._shards.paths[shard].relative_to(self.data_root)
        return f'{path.with_suffix("")}/{row}'

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads a row.

        Raises:
            BadRecord: ``corrupt_shard``, ``missing_shard``, or as :func:`region_row_sample`.
        """
        sample_id = self.sample_id(index)
        row = self._shards.read(index, COLUMNS, f'{self.source}/{sample_id}')
        return region_row_sample(row, self.data_root, self.source, sample_id, self.max_regions, rng)
