"""SA-1B: about a hundred nested masks an image, no classes, no captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.index_cache import cached_index
from projects.llava_sam2_rl.datasets.records import (
    fit_mask,
    path_inside,
    read_image,
    segmentation_to_mask,
)
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

#: Stands for a whole file that cannot be read: it comes up once, as a bad record.
_NO_ANNOTATION = -1


@DATASETS.register_module()
class SA1BDataset(RegionDataset):
    """One record per mask.

    Layout: ``sa_N.jpg`` and ``sa_N.json`` in ``data_root`` (or in folders below it), or the JSON
    files below ``{data_root}/js`` and the images below ``{data_root}/img`` by the same names.

    What the filters look at is indexed once (see :func:`cached_index`), so other filters need no
    new index. A file that cannot be read stays in the data set as one bad record.

    Args:
        data_root: Folder of the files.
        min_area: Smallest mask, as a share of the image, in [0, 1].
        predicted_iou: Smallest predicted IoU.
        stability_score: Smallest stability score.
        cache_dir: Folder of the index, see :func:`cached_index`.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: There is no JSON file.
        ValueError: ``min_area`` is no share, or no mask passes the filters.
    """

    def __init__(
        self,
        data_root: str,
        min_area: float = 0.0,
        predicted_iou: float = 0.0,
        stability_score: float = 0.0,
        cache_dir: str | None = None,
        source: str = 'sa1b',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        if not 0 <= min_area <= 1:
            raise ValueError(f'{source}: min_area is a share of the image, got {min_area}')
        root = Path(data_root)
        apart = (root / 'js').is_dir()
        self.json_dir = root / 'js' if apart else root
        self.image_dir = root / 'img' if apart else root
        files = sorted(self.json_dir.glob('**/*.json'))
        files = [file for file in files if '.index_cache' not in file.parts]
        if not files:
            raise FileNotFoundError(
                f'{self.json_dir} holds no .json file: download archives of SA-1B from '
                'https://ai.meta.com/datasets/segment-anything-downloads and extract them there'
            )
        self._index = cached_index(
            files, lambda: index_files(files, self.json_dir), 'sa1b', cache_dir
        )
        bounds = {
            'area': min_area,
            'predicted_iou': predicted_iou,
            'stability_score': stability_score,
        }
        good = np.ones(len(self._index['file']), bool)
        for key, least in bounds.items():
            if least > 0:
                good &= self._index[key] >= least
        self._rows = np.flatnonzero(good | (self._index['annotation'] == _NO_ANNOTATION))
        if not len(self._rows):
            raise ValueError(
                f'{source}: none of {len(good)} masks has min_area={min_area}, '
                f'predicted_iou={predicted_iou}, stability_score={stability_score}'
            )

    @property
    def num_records(self) -> int:
        """Masks that pass the filters, and files that cannot be read."""
        return len(self._rows)

    def _locate(self, index: int) -> tuple[str, int]:
        row = self._rows[index]
        name = self._index['files'][self._index['file'][row]].decode()
        return name, int(self._index['annotation'][row])

    def sample_id(self, index: int) -> str:
        """``sa_N-i``: the i-th annotation of the file."""
        name, annotation = self._locate(index)
        return f'{name.removesuffix(".json")}-{annotation}'

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads a mask; nothing about it is random."""
        file, number = self._locate(index)
        sample_id = self.sample_id(index)
        name = f'{self.source}/{sample_id}'
        image, annotations = _read_json(self.json_dir / file, name)
        if not 0 <= number < len(annotations):
            raise BadRecord('bad_json', name, f'{file} holds {len(annotations)} annotations')
        annotation = annotations[number]
        if not isinstance(annotation, dict):
            raise BadRecord('bad_json', name, f'annotation {number} of {file} is no object')
        try:
            size = int(image['height']), int(image['width'])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadRecord('bad_json', name, f'{file}: image size: {error!r}') from error
        mask = segmentation_to_mask(annotation.get('segmentation'), *size, name)
        stem = file.removesuffix('.json')
        picture = read_image(
            path_inside(self.image_dir, f'{stem}.jpg', name), name, annotated=mask.shape
        )
        return RegionSample(
            image=picture,
            mask=fit_mask(mask, picture, name),
            source=self.source,
            sample_id=sample_id,
        )


def index_files(files: list[Path], root: Path) -> dict[str, np.ndarray]:
    """What the filters need of every annotation.

    Returns:
        ``files`` (F,) fixed-width bytes, paths below ``root``; and per annotation ``file`` int32,
        ``annotation`` int32 (-1 for a file that cannot be read), ``area`` (share of the image),
        ``predicted_iou`` and ``stability_score`` float32 (NaN where there is no such number).
    """
    rows: list[np.ndarray] = []
    for number, path in enumerate(files):
        try:
            image, annotations = _read_json(path, path.name)
        except BadRecord:
            annotations = []
        if not annotations:
            rows.append(np.array([[number, _NO_ANNOTATION, np.nan, np.nan, np.nan]]))
            continue
        pixels = _number(image.get('height')) * _number(image.get('width'))
        block = np.empty((len(annotations), 5))
        for i, annotation in enumerate(annotations):
            given = annotation if isinstance(annotation, dict) else {}
            scores = [_number(given.get(k)) for k in ('area', 'predicted_iou', 'stability_score')]
            block[i] = number, i, scores[0] / pixels if pixels else np.nan, *scores[1:]
        rows.append(block)
    table = np.concatenate(rows)
    return {
        'files': np.array([path.relative_to(root).as_posix().encode() for path in files]),
        'file': table[:, 0].astype(np.int32),
        'annotation': table[:, 1].astype(np.int32),
        'area': table[:, 2].astype(np.float32),
        'predicted_iou': table[:, 3].astype(np.float32),
        'stability_score': table[:, 4].astype(np.float32),
    }


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def _read_json(path: Path, record: str) -> tuple[dict[str, Any], list[Any]]:
    """``image`` and ``annotations`` of a file.

    Raises:
        BadRecord: ``bad_json``.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadRecord('bad_json', record, f'{path}: {error}') from error
    image = data.get('image') if isinstance(data, dict) else None
    annotations = data.get('annotations') if isinstance(data, dict) else None
    if not isinstance(image, dict) or not isinstance(annotations, list):
        raise BadRecord('bad_json', record, f'{path}: needs "image" and "annotations"')
    return image, annotations
