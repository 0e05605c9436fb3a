"""gRefCOCO: expressions that refer to one object of a COCO photograph, to several, or to none."""

from __future__ import annotations

import json
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
from projects.llava_sam2_rl.datasets.refcoco import (
    compact_polygons,
    sentence_text,
    usable_sentences,
)
from projects.llava_sam2_rl.datasets.unpickle import load_plain_pickle
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

SPLITS = ('train', 'val', 'testA', 'testB')
#: The ``ann_id`` of an expression that refers to nothing in its image.
NO_TARGET = -1

_DOWNLOAD = (
    'download gRefCOCO (https://github.com/henghuiding/gRefCOCO), and point data_root at the '
    'folder that holds grefcoco/ with grefs(unc).json (or .p) and instances.json'
)


@dataclass(frozen=True)
class _Reference:
    sample_id: str
    #: Empty: no target.
    ann_ids: tuple[int, ...]
    sentences: tuple[str, ...]
    file_name: Any
    height: Any
    width: Any
    category: str | None


@DATASETS.register_module()
class GRefCOCODataset(RegionDataset):
    """One record per referred set of objects; one of its expressions is drawn each time.

    Layout: ``{data_root}/grefcoco/grefs(unc).json`` (or ``.p``), whose entries name a list of
    objects by ``ann_id``, joined to ``{data_root}/grefcoco/instances.json`` (COCO); pictures are
    ``{image_dir}/{images[].file_name}``. Crowds among the objects are left out. A list ``[-1]``
    means that the expression refers to nothing: such a record has a mask ``(0, H, W)``, all others
    ``(R, H, W)``, an object each.

    Args:
        data_root: Folder that holds ``grefcoco/``.
        split: ``'train'``, ``'val'``, ``'testA'`` or ``'testB'``.
        image_dir: Folder of the pictures, absolute or below ``data_root``.
        per_sentence: Makes each expression a record of its own, in the order of the file, as an
            evaluation needs it.
        no_target: ``False`` leaves expressions without an object out. Defaults to True.
        seg_per_object: ``True``: an expression of several objects is answered with a ``[SEG]`` and
            a mask for each. Defaults to False: one ``[SEG]`` for the union of their masks, as in
            the official evaluation.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: An annotation file is not there.
        ValueError: Unknown split, or the annotation files do not fit together.
    """

    def __init__(
        self,
        data_root: str,
        split: str = 'train',
        image_dir: str = 'train2014',
        per_sentence: bool = False,
        no_target: bool = True,
        seg_per_object: bool = False,
        source: str = 'grefcoco',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        if split not in SPLITS:
            raise ValueError(f'gRefCOCO has the splits {SPLITS}, not {split!r}')
        self.image_dir = Path(data_root) / image_dir
        self.seg_per_object = seg_per_object
        folder = Path(data_root) / 'grefcoco'
        refs_path = folder / 'grefs(unc).json'
        if not refs_path.is_file() and (pickled := refs_path.with_suffix('.p')).is_file():
            refs_path = pickled
        instances_path = folder / 'instances.json'
        refs = _references(required_file(refs_path, _DOWNLOAD), split)
        if not no_target:
            refs = [ref for ref in refs if ref['ann_id'] != [NO_TARGET]]
        with open(required_file(instances_path, _DOWNLOAD), encoding='utf-8') as file:
            instances = json.load(file)
        wanted = {ann_id for ref in refs for ann_id in ref['ann_id']}
        annotations = {a['id']: a for a in instances['annotations'] if a['id'] in wanted}
        _check_join(refs, annotations, refs_path, instances_path)
        self._shapes = {
            key: compact_polygons(a.get('segmentation'))
            for key, a in annotations.items()
            if not a.get('iscrowd')
        }
        images = {image['id']: image for image in instances['images']}
        names = {c['id']: c['name'] for c in instances.get('categories', ())}
        self._references: list[_Reference] = []
        for ref in refs:
            # What is missing makes a bad record when it is read, not here.
            image = images.get(ref.get('image_id'), {})
            ann_ids = tuple(ann_id for ann_id in ref['ann_id'] if ann_id != NO_TARGET)
            kinds = {annotations[ann_id].get('category_id') for ann_id in ann_ids}
            sentences = [sentence_text(sentence) for sentence in ref.get('sentences') or ()]
            groups = [(s,) for s in sentences] if per_sentence else [tuple(sentences)]
            for i, group in enumerate(groups):
                self._references.append(
                    _Reference(
                        sample_id=f'{ref["ref_id"]}-{i}' if per_sentence else str(ref['ref_id']),
                        ann_ids=ann_ids,
                        sentences=group,
                        file_name=image.get('file_name'),
                        height=image.get('height'),
                        width=image.get('width'),
                        category=names.get(kinds.pop()) if len(kinds) == 1 else None,
                    )
                )

    @property
    def num_records(self) -> int:
        """Referred sets of objects, or expressions with ``per_sentence``."""
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
        size = (int(ref.height), int(ref.width))
        shapes = [self._shapes[ann_id] for ann_id in ref.ann_ids if ann_id in self._shapes]
        if ref.ann_ids and not shapes:
            raise BadRecord('only_crowds', name, f'the objects {list(ref.ann_ids)}')
        masks = [segmentation_to_mask(shape, *size, name) for shape in shapes]
        path = path_inside(self.image_dir, ref.file_name, name)
        image = read_image(path, name, annotated=masks[0].shape if masks else size)
        mask = np.zeros((0, *image.shape[:2]), bool)
        if masks:
            mask = np.stack([fit_mask(mask, image, name) for mask in masks])
        return RegionSample(
            image=image,
            mask=mask,
            caption=sentences[int(rng.integers(len(sentences)))],
            source=self.source,
            sample_id=ref.sample_id,
            category=ref.category,
            seg_per_region=self.seg_per_object and len(mask) > 1,
        )


def _references(path: Path, split: str) -> list[dict[str, Any]]:
    """The references of a split, ``ann_id`` always a list.

    Raises:
        ValueError: The file holds something else, or nothing of the split.
    """
    if path.suffix == '.p':
        found = load_plain_pickle(path)
    else:
        try:
            found = json.loads(path.read_text(encoding='utf-8'))
        except ValueError as error:
            raise ValueError(f'{path} is no JSON: {error}') from error
    if not isinstance(found, list) or not all(isinstance(ref, dict) for ref in found):
        raise ValueError(f'{path} is no list of references: {_DOWNLOAD}')
    refs = [dict(ref) for ref in found if ref.get('split') == split]
    if not refs:
        raise ValueError(f'{path} holds no reference of the split {split!r}')
    for ref in refs:
        ann_id = ref.get('ann_id')
        ref['ann_id'] = ids = ann_id if isinstance(ann_id, list) else [ann_id]
        numbers = bool(ids) and all(isinstance(x, int) for x in ids)
        if not numbers or (NO_TARGET in ids and len(ids) > 1):
            raise ValueError(
                f'{path}: the ann_id of ref_id {ref.get("ref_id")} is {ann_id!r}; it must be a '
                f'list of objects, or [{NO_TARGET}] where the expression refers to nothing'
            )
    return refs


def _check_join(
    refs: list[dict[str, Any]], annotations: dict[int, Any], refs_path: Path, instances_path: Path
) -> None:
    lost = [
        ref['ref_id']
        for ref in refs
        for ann_id in ref['ann_id']
        if ann_id != NO_TARGET
        and annotations.get(ann_id, {}).get('image_id', ref) != ref.get('image_id')
    ]
    if lost:
        raise ValueError(
            f'{len(set(lost))} of {len(refs)} references of {refs_path} have an object that is not '
            f'in {instances_path}, or is of another image there, the first is ref_id {lost[0]}: '
            'the files do not belong together'
        )
