"""A folder of pictures with masks and captions beside them, told apart by their names."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.records import read_image, read_text
from projects.llava_sam2_rl.datasets.regions import draw_caption, read_region
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

#: Endings of pictures.
PICTURES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')
_MASK = re.compile(r'(?P<stem>.+)\.mask(?P<which>[^/]*)\.png', re.IGNORECASE | re.DOTALL)
_TEXT = '.txt'


@dataclass(frozen=True)
class _Region:
    image: Path
    mask: Path
    #: Which of the picture's masks, in the order of their names, of how many.
    number: int
    of: int
    #: File with the caption of this mask, or of all masks of the picture.
    own_text: Path | None
    common_text: Path | None


@DATASETS.register_module()
class FolderRegionDataset(RegionDataset):
    """One record per ``NAME.mask*.png``: a region of the picture ``NAME.jpg`` beside it.

    A mask is all that is not black. Its caption is in the text file with the same name but for the
    ending, ``NAME.mask1.txt``, or without ``mask``, ``NAME1.txt``, ``NAME.1.txt``, ``NAME_1.txt``;
    for a picture with one mask also in ``NAME.txt``. Every line is a caption, of which one is drawn
    each time. For a picture with several masks ``NAME.txt`` has a line for each, in the order of
    the masks' names. Pictures without a mask are not used, masks without a caption are used without
    one. Folders below are read too, links to folders are not.

    Args:
        data_root: The folder.
        annotation_dir: Folder of masks and texts, in the same folders below it as their pictures.
            Defaults to ``data_root``.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: The folder is not there, or has no mask that belongs to a picture.
    """

    def __init__(
        self,
        data_root: str,
        annotation_dir: str | None = None,
        source: str = 'folder',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        self.data_root = Path(data_root)
        annotations = self.data_root if annotation_dir is None else Path(annotation_dir)
        for folder in {self.data_root, annotations}:
            if not folder.is_dir():
                raise FileNotFoundError(f'there is no folder {folder}')
        pictures = find_pictures(self.data_root)
        masks, texts = _find_annotations(annotations)
        self._regions = list(_regions(pictures, masks, texts, self.data_root, annotations))
        if not self._regions:
            raise FileNotFoundError(
                f'{self.data_root} has {len(pictures)} pictures and {annotations} {len(masks)} '
                'masks, none of which belongs to a picture: name them NAME.jpg and NAME.mask.png, '
                'or NAME.mask1.png, NAME.mask2.png, …'
            )
        used = {region.image for region in self._regions}
        lost = len(masks) - len(self._regions)
        if lost or len(used) < len(pictures):
            print_log(
                f'{source}: {len(pictures) - len(used)} of {len(pictures)} pictures have no mask '
                f'and {lost} of {len(masks)} masks no picture; they are left out',
                logger='current',
                level=logging.WARNING if lost else logging.INFO,
            )

    @property
    def num_records(self) -> int:
        """Masks that belong to a picture."""
        return len(self._regions)

    def sample_id(self, index: int) -> str:
        """The mask's name without its ending, below the folder."""
        region = self._regions[index]
        folder = region.image.parent.relative_to(self.data_root)
        return (folder / region.mask.name).as_posix().rpartition('.')[0]

    def image_key(self, index: int) -> str:
        """The picture's name below the folder."""
        return self._regions[index].image.relative_to(self.data_root).as_posix()

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads a mask, its picture and one of its captions.

        Raises:
            BadRecord: ``bad_encoding``, ``caption_count``, or as `read_region` and `read_image`.
        """
        region = self._regions[index]
        sample_id = self.sample_id(index)
        name = f'{self.source}/{sample_id}'
        image, mask = read_region(
            lambda size: read_image(region.image, name, size),
            region.mask.name,
            region.mask.parent,
            name,
        )
        return RegionSample(
            image=image,
            mask=mask,
            caption=draw_caption(self._captions(region, name), rng, name),
            source=self.source,
            sample_id=sample_id,
        )

    def _captions(self, region: _Region, name: str) -> list[str]:
        path = region.own_text or region.common_text
        if path is None:
            return []
        lines = [line.strip() for line in read_text(path, name).splitlines() if line.strip()]
        if region.own_text is not None or region.of == 1:
            return lines
        if len(lines) != region.of:
            raise BadRecord(
                'caption_count',
                name,
                f'{path} has {len(lines)} lines for {region.of} masks: write one for each, or a '
                'file for each mask',
            )
        return [lines[region.number]]


def find_pictures(folder: Path) -> list[Path]:
    """The pictures below a folder that are no masks, sorted."""
    return sorted(
        path
        for path in _files(folder)
        if path.suffix.lower() in PICTURES and not _MASK.fullmatch(path.name)
    )


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, without hidden ones and without folders that are links."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            if not name.startswith('.'):
                yield Path(parent, name)


def _find_annotations(folder: Path) -> tuple[list[Path], list[Path]]:
    """Masks and texts below a folder, sorted."""
    masks, texts = [], []
    for path in _files(folder):
        if _MASK.fullmatch(path.name):
            masks.append(path)
        elif path.suffix.lower() == _TEXT:
            texts.append(path)
    return sorted(masks, key=_natural), sorted(texts)


def _natural(path: Path) -> tuple[Any, ...]:
    """``mask2`` before ``mask10``."""
    parts = re.split(r'(\d+)', path.name)
    return (path.parent, [(0, int(p), '') if p.isdecimal() else (1, 0, p) for p in parts])


def _regions(
    pictures: Iterable[Path],
    masks: Iterable[Path],
    texts: Iterable[Path],
    data_root: Path,
    annotations: Path,
) -> Iterator[_Region]:
    """Masks with their pictures and texts; of files with a common beginning the longest counts."""
    by_place = {(p.parent.relative_to(data_root), p.stem): p for p in reversed(list(pictures))}
    stems: dict[Path, set[str]] = {}
    for folder, name in by_place:
        stems.setdefault(folder, set()).add(name)
    own: dict[tuple[Path, str], list[Path]] = {}
    for mask in masks:
        found = _MASK.fullmatch(mask.name)
        place = (mask.parent.relative_to(annotations), found['stem'] if found else '')
        if place in by_place:
            own.setdefault(place, []).append(mask)
    captions: dict[tuple[Path, str], dict[str, Path]] = {}
    for text in texts:
        folder = text.parent.relative_to(annotations)
        stem = _longest_beginning(stems.get(folder, set()), text.stem)
        if stem is not None:
            captions.setdefault((folder, stem), {})[_which(text.stem[len(stem) :])] = text
    for place, found_masks in own.items():
        known = captions.get(place, {})
        for number, mask in enumerate(found_masks):
            match = _MASK.fullmatch(mask.name)
            which = _which(f'.mask{match["which"]}' if match else '')
            yield _Region(
                image=by_place[place],
                mask=mask,
                number=number,
                of=len(found_masks),
                own_text=known.get(which) if which else known.get('.mask'),
                common_text=known.get(''),
            )


def _longest_beginning(stems: set[str], name: str) -> str | None:
    beginnings = (name[:end] for end in range(len(name), 0, -1))
    return next((beginning for beginning in beginnings if beginning in stems), None)


def _which(ending: str) -> str:
    """What names a mask: ``1`` of ``.mask1``, ``mask1``, ``_1``, ``.1`` and ``1``.

    ``''`` for no ending, ``'.mask'`` for that alone.
    """
    if ending.lower() == '.mask':
        return '.mask'
    return re.sub(r'^[._\- ]*(?:mask|caption)?[._\- ]*', '', ending, flags=re.IGNORECASE)
