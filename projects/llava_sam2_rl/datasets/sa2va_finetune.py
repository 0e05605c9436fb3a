"""The fine-tuning data of the official Sa2VA code: images with polygons and a text for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.records import (
    path_inside,
    polygons_to_mask,
    read_image,
    required_file,
)
from projects.llava_sam2_rl.datasets.refcoco import compact_polygons
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

_FORMAT = (
    '[{"image": file name, "mask": [object: [polygon: [x1, y1, x2, y2, …]]], "text": [one for each '
    'object]}]'
)
_RLE = (
    'is a run-length code, the format takes polygons only: decode it (pycocotools.mask.decode) and '
    'write its outlines (cv2.findContours) as [[x1, y1, x2, y2, …], …], one such list an object'
)


@dataclass(frozen=True)
class _Entry:
    image: str
    #: Polygons of each object.
    objects: list[Any]
    texts: list[str]


@DATASETS.register_module()
class Sa2VAFinetuneDataset(RegionDataset):
    """One record per image: its objects, and what each is called.

    Layout: ``{data_root}/annotations.json``, a list of ``{"image": file name, "mask": [object:
    [polygon: [x1, y1, x2, y2, …]]], "text": [one for each object]}``, and pictures below
    ``{data_root}/images``. The polygons of an object are united. As in the official code, texts
    are lower-cased and lose one final full stop, and the objects of an image are asked for one
    after the other in one conversation: the samples have a mask ``(R, H, W)`` and R
    ``region_captions``.

    Args:
        data_root: Folder that holds ``ann_file`` and ``image_dir``.
        ann_file: The annotations, absolute or below ``data_root``. Defaults to
            ``'annotations.json'``.
        image_dir: Folder of the pictures, absolute or below ``data_root``. Defaults to
            ``'images'``.
        per_object: Makes each object a record of its own, with one ``caption``, as an evaluation
            needs it. Defaults to False.
        max_objects: Most objects of an image that one conversation asks for; of more, a random
            choice is drawn each time. Defaults to None: all, as officially.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: There are no annotations.
        ValueError: An entry is not as above: masks as run-length codes, an empty text, another
            number of texts than of masks. The message names file, entry and what to do.
    """

    def __init__(
        self,
        data_root: str,
        ann_file: str = 'annotations.json',
        image_dir: str = 'images',
        per_object: bool = False,
        max_objects: int | None = None,
        source: str = 'sa2va_finetune',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        if max_objects is not None and max_objects < 1:
            raise ValueError(f'{source}: max_objects must be at least 1, got {max_objects}')
        self.image_dir = Path(data_root) / image_dir
        self.max_objects = max_objects
        self._entries = _read_entries(
            required_file(
                Path(data_root) / ann_file,
                f'data_root holds the official fine-tuning data, {_FORMAT} and images/',
            )
        )
        self._records: list[tuple[int, int | None]] = [(i, None) for i in range(len(self._entries))]
        if per_object:
            self._records = [
                (i, k) for i, entry in enumerate(self._entries) for k in range(len(entry.objects))
            ]

    @property
    def num_records(self) -> int:
        """Images, or objects with ``per_object``."""
        return len(self._records)

    def sample_id(self, index: int) -> str:
        """The number of the entry; with ``per_object`` also that of the object."""
        entry, which = self._records[index]
        return str(entry) if which is None else f'{entry}-{which}'

    def image_key(self, index: int) -> str:
        """The picture's name."""
        return self._entries[self._records[index][0]].image

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads a record; which of too many objects are asked for is chosen by ``rng``."""
        number, which = self._records[index]
        entry = self._entries[number]
        sample_id = self.sample_id(index)
        name = f'{self.source}/{sample_id}'
        chosen = list(range(len(entry.objects))) if which is None else [which]
        if self.max_objects is not None and len(chosen) > self.max_objects:
            chosen = sorted(rng.choice(len(chosen), self.max_objects, replace=False).tolist())
        image = read_image(path_inside(self.image_dir, entry.image, name), name)
        height, width = image.shape[:2]
        masks = [polygons_to_mask(entry.objects[k], height, width, name) for k in chosen]
        for k, mask in zip(chosen, masks, strict=True):
            if not mask.any():
                raise BadRecord('empty_mask', name, f'object {k} covers no pixel of the image')
        texts = tuple(entry.texts[k] for k in chosen)
        return RegionSample(
            image=image,
            mask=np.stack(masks),
            caption=None if which is None else texts[0],
            region_captions=texts if which is None else (),
            source=self.source,
            sample_id=sample_id,
        )


def _read_entries(path: Path) -> list[_Entry]:
    """All entries, checked.

    Raises:
        ValueError: One is at fault; see the class.
    """
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON: {error}') from error
    if not isinstance(found, list) or not found:
        raise ValueError(f'{path} must be a list that is not empty: {_FORMAT}')
    faults = [
        f'{path}, entry {i}{_named(raw)}: {fault}'
        for i, raw in enumerate(found)
        if (fault := _fault(raw))
    ]
    if faults:
        more = f' ({len(faults)} of {len(found)} entries are at fault)' if faults[1:] else ''
        raise ValueError(faults[0] + more)
    return [
        _Entry(
            image=raw['image'],
            objects=[compact_polygons(polygons) for polygons in raw['mask']],
            texts=[_asked(text) for text in raw['text']],
        )
        for raw in found
    ]


def _named(raw: Any) -> str:
    return f' ({raw["image"]!r})' if isinstance(raw, dict) and 'image' in raw else ''


def _asked(text: str) -> str:
    """A text as the official code asks for it: lower case, on one line, no final full stop."""
    return ' '.join(text.lower().split()).removesuffix('.').rstrip()


def _fault(raw: Any) -> str | None:
    """What is wrong with an entry and what to do, ``None`` for a good one."""
    if not isinstance(raw, dict) or not {'image', 'mask', 'text'} <= raw.keys():
        keys = sorted(raw) if isinstance(raw, dict) else f'a {type(raw).__name__}'
        return f'must have image, mask and text, has {keys}'
    if not isinstance(raw['image'], str) or not raw['image']:
        return f'image is {raw["image"]!r}: give a file name below images/'
    masks, texts = raw['mask'], raw['text']
    if isinstance(masks, dict):
        return f'mask {_RLE}'
    for what, value in (('mask', masks), ('text', texts)):
        if not isinstance(value, list) or not value:
            return f'{what} must be a list, one for each object, got {str(value)[:60]!r}'
    for k, polygons in enumerate(masks):
        parts = polygons if isinstance(polygons, list) else [polygons]
        if any(isinstance(part, dict) for part in parts):
            return f'mask {k} {_RLE}'
        if not isinstance(polygons, list) or not all(isinstance(part, list) for part in polygons):
            return (
                f'mask {k} must be a list of polygons [[x1, y1, x2, y2, …], …], '
                f'got {str(polygons)[:60]!r}'
            )
    for k, text in enumerate(texts):
        if not isinstance(text, str) or not _asked(text):
            return f'text {k} is {text!r}: write what mask {k} shows, or delete both'
    if len(texts) != len(masks):
        return (
            f'{len(texts)} texts for {len(masks)} masks: give each mask a text, in the same order'
        )
    return None
