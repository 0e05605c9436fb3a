"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that refer to one object of a COCO photograph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.records import (
    fit_mask,
    path_inside,
    read_image,
    required_file,
    segmentation_to_mask,
)
from projects.llava_sam2_rl.datasets.unpickle import load_plain_pickle
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

#: Splits by the way a set was split.
SPLITS = {
    'unc': ('train', 'val', 'testA', 'testB'),
    'umd': ('train', 'val', 'test'),
    'google': ('train', 'val'),
}
SPLIT_BY = {
    'refcoco': ('unc', 'google'),
    'refcoco+': ('unc',),
    'refcocog': ('umd', 'google'),
}

_DOWNLOAD = (
    'download the RefCOCO annotations (refcoco.zip, refcoco+.zip, refcocog.zip), unpack them below '
    'data_root and point data_root at the folder that holds refcoco/, refcoco+/ and refcocog/'
)


@dataclass(frozen=True)
class _Reference:
    sample_id: str
    ann_id: int
    sentences: tuple[str, ...]
    file_name: Any
    height: Any
    width: Any
    segmentation: Any
    category: str | None


@DATASETS.register_module()
class RefCOCODataset(RegionDataset):
    """One record per referred object; one of its expressions is drawn each time.

    Layout: ``{data_root}/{dataset}/refs({split_by}).p`` joined by ``ann_id`` to
    ``{data_root}/{dataset}/instances.json`` (COCO); pictures are
    ``{image_dir}/{images[].file_name}``.

    Args:
        data_root: Folder that holds the data sets' folders.
        dataset: ``'refcoco'``, ``'refcoco+'`` or ``'refcocog'``.
        split: ``'train'``, ``'val'``, ``'testA'``, ``'testB'`` (unc) or ``'test'`` (umd).
        split_by: ``'unc'``, ``'umd'`` or ``'google'``; by default the usual one of the data set.
        image_dir: Folder of the pictures, absolute or below ``data_root``.
        per_sentence: Makes each expression a record of its own, in the order of the file, as an
            evaluation needs it.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: An annotation file is not there.
        ValueError: Unknown data set or split, or the annotation files do not fit together.
    """

    def __init__(
        self,
        data_root: str,
        dataset: str = 'refcoco',
        split: str = 'train',
        split_by: str | None = None,
        image_dir: str = 'train2014',
        per_sentence: bool = False,
        source: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source or dataset, **kwargs)
        if dataset not in SPLIT_BY:
            raise ValueError(f'dataset must be one of {sorted(SPLIT_BY)}, got {dataset!r}')
        split_by = SPLIT_BY[dataset][0] if split_by is None else split_by
        if split_by not in SPLIT_BY[dataset]:
            raise ValueError(f'{dataset} is split by {SPLIT_BY[dataset]}, not by {split_by!r}')
        if split not in SPLITS[split_by]:
            raise ValueError(
                f'{dataset} ({split_by}) has the splits {SPLITS[split_by]}, not {split!r}'
            )
        self.image_dir = Path(data_root) / image_dir
        folder = Path(data_root) / dataset
        self._references = self._join(
            required_file(folder / f'refs({split_by}).p', _DOWNLOAD),
            required_file(folder / 'instances.json', _DOWNLOAD),
            split,
            per_sentence,
        )
        self._neighbours = self._by_picture(self._references)

    def _join(
        self, refs_path: Path, instances_path: Path, split: str, per_sentence: bool
    ) -> list[_Reference]:
        refs = [ref for ref in load_plain_pickle(refs_path) if ref['split'] == split]
        if not refs:
            raise ValueError(f'{refs_path} holds no reference of the split {split!r}')
        with open(instances_path, encoding='utf-8') as file:
            instances = json.load(file)
        wanted = {ref['ann_id'] for ref in refs}
        annotations = {a['id']: a for a in instances['annotations'] if a['id'] in wanted}
        images = {image['id']: image for image in instances['images']}
        names = {c['id']: c['name'] for c in instances.get('categories', ())}
        lost = [ref['ref_id'] for ref in refs if ref['ann_id'] not in annotations]
        if lost:
            raise ValueError(
                f'{len(lost)} of {len(refs)} references of {refs_path} have no annotation in '
                f'{instances_path}, the first is ref_id {lost[0]}: the files do not belong together'
            )
        shapes = {key: compact_polygons(a.get('segmentation')) for key, a in annotations.items()}
        references = []
        for ref in refs:
            annotation = annotations[ref['ann_id']]
            # What is missing or of another kind makes a bad record when it is read, not here.
            image = images.get(annotation.get('image_id'), {})
            sentences = [sentence_text(sentence) for sentence in ref.get('sentences') or ()]
            groups = [(s,) for s in sentences] if per_sentence else [tuple(sentences)]
            for i, group in enumerate(groups):
                references.append(
                    _Reference(
                        sample_id=f'{ref["ref_id"]}-{i}' if per_sentence else str(ref['ref_id']),
                        ann_id=ref['ann_id'],
                        sentences=group,
                        file_name=image.get('file_name'),
                        height=image.get('height'),
                        width=image.get('width'),
                        segmentation=shapes[ref['ann_id']],
                        category=names.get(annotation.get('category_id')),
                    )
                )
        return references

    @staticmethod
    def _by_picture(references: list[_Reference]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, ref in enumerate(references):
            found.setdefault(ref.file_name, []).append(i)
        return found

    def _distractor(self, ref: _Reference, rng: np.random.Generator) -> str | None:
        others = [
            sentence
            for i in self._neighbours[ref.file_name]
            if self._references[i].ann_id != ref.ann_id
            for sentence in usable_sentences(self._references[i].sentences)
        ]
        return others[int(rng.integers(len(others)))] if others else None

    @property
    def num_records(self) -> int:
        """Referred objects, or expressions with ``per_sentence``."""
        return len(self._references)

    def sample_id(self, index: int) -> str:
        """The ``ref_id``; with ``per_sentence`` also the number of the expression."""
        return self._references[index].sample_id

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads a record with one of its non-empty expressions, chosen by ``rng``."""
        ref = self._references[index]
        name = f'{self.source}/{ref.sample_id}'
        sentences = usable_sentences(ref.sentences)
        if not sentences:
            raise BadRecord('empty_expression', name)
        if not isinstance(ref.file_name, str):
            raise BadRecord('missing_image', name, f'the file name is {ref.file_name!r}')
        if not isinstance(ref.height, (int, float)) or not isinstance(ref.width, (int, float)):
            raise BadRecord('bad_size', name, f'{ref.height!r} x {ref.width!r}')
        mask = segmentation_to_mask(ref.segmentation, int(ref.height), int(ref.width), name)
        path = path_inside(self.image_dir, ref.file_name, name)
        image = read_image(path, name, annotated=mask.shape)
        return RegionSample(
            image=image,
            mask=fit_mask(mask, image, name),
            caption=sentences[int(rng.integers(len(sentences)))],
            source=self.source,
            sample_id=ref.sample_id,
            category=ref.category,
            distractor=self._distractor(ref, rng),
        )


def usable_sentences(sentences: Sequence[str]) -> list[str]:
    """Those that hold more than blanks and full stops."""
    return [sentence for sentence in sentences if sentence.strip(' .')]


def sentence_text(sentence: Any) -> str:
    """The text of an entry of ``sentences``, on one line; ``''`` where there is none."""
    if not isinstance(sentence, dict):
        return ''
    return ' '.join(str(sentence.get('sent') or sentence.get('raw') or '').split())


def compact_polygons(segmentation: Any) -> Any:
    """Polygons as arrays: an eighth of the memory of lists of floats."""
    if not isinstance(segmentation, list):
        return segmentation
    try:
        return [np.asarray(polygon, dtype=np.float64) for polygon in segmentation]
    except (TypeError, ValueError):
        return segmentation
