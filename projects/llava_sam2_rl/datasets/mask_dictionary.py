"""``mask_dict.json`` and ``mask_dict.pkl``: the masks of every object of a video benchmark."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.datasets.index_cache import CachedIndex, cached_index
from projects.llava_sam2_rl.datasets.json_values import iterate_object, read_value
from projects.llava_sam2_rl.datasets.unpickle import load_plain_pickle


class MaskDictionary:
    """Values by key.

    Of a JSON file, which may have hundreds of megabytes, an index holds where each value lies, and
    values are read as they are asked for. A pickle is loaded whole, without running anything.

    Args:
        path: ``.json``, or anything else for a pickle.
        cache_dir: Folder of the index, see `cached_index`.

    Raises:
        ValueError: The file holds no such thing.
    """

    def __init__(self, path: Path, cache_dir: str | Path | None = None) -> None:
        self.path = path
        self._index: CachedIndex | None = None
        self._values: dict[str, Any] = {}
        if path.suffix == '.json':
            self._index = cached_index([path], self._places, 'mask_dictionary', cache_dir)
            return
        try:
            values = load_plain_pickle(path)
        except pickle.UnpicklingError as error:
            raise ValueError(f'{error}: download the file again') from error
        if not isinstance(values, dict):
            raise ValueError(f'{path} holds a {type(values).__name__}, expected masks by their id')
        self._values = {str(key): value for key, value in values.items()}

    def get(self, key: str, record: str) -> Any:
        """The value of a key.

        Raises:
            BadRecord: ``missing_annotation``, where there is none; ``bad_annotation``, where the
                file has changed.
        """
        if self._index is None:
            if key not in self._values:
                raise BadRecord('missing_annotation', record, f'{self.path} has no {key!r}')
            return self._values[key]
        keys, wanted = self._index['key'], key.encode('utf-8', 'replace')
        # The last one of equal keys, as JSON readers have it.
        at = int(np.searchsorted(keys, wanted, side='right')) - 1
        if at < 0 or keys[at] != wanted:
            raise BadRecord('missing_annotation', record, f'{self.path} has no {key!r}')
        try:
            start, length = (int(self._index[name][at]) for name in ('start', 'length'))
            return read_value(self.path, start, length)
        except (OSError, ValueError) as error:
            raise BadRecord('bad_annotation', record, f'{self.path}: {error}') from error

    def _places(self) -> dict[str, np.ndarray]:
        keys, places = [], []
        for key, _, start, length in iterate_object(self.path):
            keys.append(key.encode('utf-8', 'replace'))
            places.append((start, length))
        order = sorted(range(len(keys)), key=keys.__getitem__)
        table = np.array(places, dtype=np.int64).reshape(-1, 2)[order]
        return {
            'key': np.array([keys[i] for i in order], dtype=np.bytes_),
            'start': table[:, 0],
            'length': table[:, 1],
        }
