"""Which source reads a user's files, and with which options."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projects.llava_sam2_rl.datasets.base import RegionDataset
from projects.llava_sam2_rl.datasets.coco_regions import COCORegionDataset, check_instances
from projects.llava_sam2_rl.datasets.folder_regions import FolderRegionDataset
from projects.llava_sam2_rl.datasets.hugging_face import (
    HuggingFaceRegionDataset,
    is_saved,
    open_table,
)
from projects.llava_sam2_rl.datasets.json_rows import iterate_rows, load_json
from projects.llava_sam2_rl.datasets.jsonl_regions import JSONLRegionDataset
from projects.llava_sam2_rl.datasets.sa2va_finetune import Sa2VAFinetuneDataset

#: Names that are looked for, to find out which folder they are below.
_LOOKED_FOR = 50
_KNOWN = (
    'known are: a folder of NAME.jpg, NAME.mask*.png and NAME*.txt; a JSONL file or JSON list of '
    '{"image", "mask", "caption"}; COCO instances; the official annotations.json of {"image", '
    '"mask", "text"}; what Hugging Face\'s save_to_disk wrote; parquet'
)
_COLUMN_WORDS = {
    'image': ('image', 'img', 'photo', 'picture'),
    'mask': ('mask', 'seg', 'rle'),
    'caption': ('caption', 'text', 'description', 'sentence', 'expression'),
}


@dataclass(frozen=True)
class Detected:
    """A source and its options.

    Args:
        kind: Class of the source.
        options: Its options, paths as they were given.
        what: The format in words.
    """

    kind: type[RegionDataset]
    options: dict[str, Any]
    what: str


def detect(
    images: Path | None,
    annotations: Path | None,
    captions: Path | None = None,
    columns: Mapping[str, str] | None = None,
) -> Detected:
    """The source that reads these files.

    Args:
        images: Folder of the pictures, where they are files of their own.
        annotations: File or folder of the annotations; ``None`` where they lie with the pictures.
        captions: File of captions beside COCO instances.
        columns: Columns of a Hugging Face data set by what is in them: ``image``, ``mask``,
            ``caption``, …

    Raises:
        ValueError: The format is not known, or a name in it leads nowhere; the message says what
            was found and what to change.
        FileNotFoundError: A file or folder is not there.
    """
    for path in (images, annotations, captions):
        if path is not None and not path.exists():
            raise FileNotFoundError(f'there is no {path}')
    if annotations is None and images is None:
        raise ValueError('give --images, --annotations, or both')
    found = _format(images, annotations if annotations is not None else images, columns or {})
    if captions is not None:
        if found.kind is not COCORegionDataset:
            raise ValueError(
                f'--captions {captions} belongs to COCO instances, {annotations or images} is '
                f'{found.what}'
            )
        found.options['captions'] = str(captions)
    if columns and found.kind is not HuggingFaceRegionDataset:
        raise ValueError(f'--columns is for data sets of Hugging Face, this is {found.what}')
    return found


def _format(images: Path | None, place: Path | None, columns: Mapping[str, str]) -> Detected:
    assert place is not None
    if place.is_dir():
        if is_saved(place) or next(place.rglob('*.parquet'), None) is not None:
            return _hugging_face(place, columns)
        if next(place.rglob('*.mask*.png'), None) is not None:
            return _folder(images or place, place)
        files = sorted(p for p in place.iterdir() if p.suffix in ('.json', '.jsonl'))
        if len(files) == 1:
            return _file(images, files[0])
        raise ValueError(
            f'{place} holds no NAME.mask*.png, no parquet and {len(files)} JSON files; {_KNOWN}'
        )
    if place.suffix == '.parquet':
        return _hugging_face(place, columns)
    return _file(images, place)


def _folder(images: Path, annotations: Path) -> Detected:
    options: dict[str, Any] = {'data_root': str(images)}
    if annotations != images:
        options['annotation_dir'] = str(annotations)
    return Detected(FolderRegionDataset, options, 'a folder of NAME.jpg, NAME.mask*.png, NAME*.txt')


def _file(images: Path | None, path: Path) -> Detected:
    """A JSON file by what its first entries have."""
    entries: list[dict[str, Any]] = []
    data: Any = None
    if path.suffix == '.json':
        data = load_json(path)
    if isinstance(data, dict) and ('annotations' in data or 'images' in data):
        check_instances(data, path)
        names = [image.get('file_name') for image in data['images'] if isinstance(image, dict)]
        folder = _folder_of(names, _candidates(images, path), path, 'pictures')
        options = {'ann_file': str(path), 'image_dir': str(folder)}
        return Detected(COCORegionDataset, options, 'COCO instances')
    for number, text in iterate_rows(path):
        if number > _LOOKED_FOR or len(entries) == _LOOKED_FOR:
            break
        try:
            entry = json.loads(text.decode('utf-8', 'replace'))
        except (ValueError, RecursionError):
            continue  # A bad record; the others say what the file is.
        if isinstance(entry, dict):
            entries.append(entry)
    described = [entry for entry in entries if {'image', 'mask'} <= entry.keys()]
    if not described:
        keys = ', '.join(sorted(entries[0])) if entries else 'no JSON objects'
        raise ValueError(f'{path} is of no known format: its entries have {keys}; {_KNOWN}')
    folder = _folder_of(
        [entry['image'] for entry in described], _candidates(images, path), path, 'pictures'
    )
    if isinstance(described[0].get('text'), list):
        options = {
            'data_root': str(path.parent),
            'ann_file': path.name,
            'image_dir': os.path.relpath(folder, path.parent),
        }
        return Detected(Sa2VAFinetuneDataset, options, "Sa2VA's official fine-tuning format")
    given: dict[str, Any] = {'ann_file': str(path), 'image_dir': str(folder)}
    masks = [entry['mask'] for entry in described if isinstance(entry['mask'], str)]
    if masks:
        mask_dir = _folder_of(masks, [folder, *_candidates(images, path)], path, 'masks')
        if mask_dir != folder:
            given['mask_dir'] = str(mask_dir)
    return Detected(JSONLRegionDataset, given, 'JSON objects with image and mask')


def _candidates(images: Path | None, path: Path) -> list[Path]:
    """Folders that names of an annotation file may be below, the likeliest first."""
    found = [] if images is None else [images]
    found += [path.parent, path.parent / 'images']
    if images is not None:
        found.append(images.parent)
    return found


def _folder_of(names: Sequence[Any], folders: Sequence[Path], path: Path, what: str) -> Path:
    """The folder that most of the first names are below."""
    some = [name for name in names if isinstance(name, str) and name][:_LOOKED_FOR]
    there = [sum((folder / name).is_file() for name in some) for folder in folders]
    best = there.index(max(there))
    if not there[best]:
        first = f', the first is {some[0]!r}' if some else ''
        raise ValueError(
            f'none of the {len(some)} {what} that {path} names first is below '
            f'{", ".join(dict.fromkeys(map(str, folders)))}{first}: give the folder that these '
            'names begin in as --images'
        )
    return folders[best]


def _hugging_face(place: Path, columns: Mapping[str, str]) -> Detected:
    options: dict[str, Any] = {'data_root': str(place)}
    splits = place / 'dataset_dict.json'
    split = None
    if splits.is_file():
        names = load_json(splits).get('splits') or []
        split = 'train' if 'train' in names or not names else names[0]
        options['split'] = split
    table = open_table(place, split, None)
    there = table.column_names
    for name in ('image', 'mask', 'caption'):
        options[name] = columns.get(name) or _column(name, there, list(options.values()))
    for name in ('image2', 'mask2', 'category'):
        if name in columns or name in there:
            options[name] = columns.get(name, name)
    if options['image'] is None or options['mask'] is None:
        types = ', '.join(f'{name} ({feature})' for name, feature in table.features.items())
        raise ValueError(
            f'{place} has the columns {types:.600}: say which hold picture, mask and caption, as '
            '--columns image=photo mask=segmentation caption=text'
        )
    return Detected(HuggingFaceRegionDataset, options, "a data set of Hugging Face's datasets")


def _column(name: str, there: Sequence[str], taken: Sequence[Any]) -> str | None:
    """The column that is called so, or whose name has a word that means it."""
    if name in there:
        return name
    # A column segmentation_mask_image holds masks.
    masks = [c for c in there if any(word in c.lower() for word in _COLUMN_WORDS['mask'])]
    for word in _COLUMN_WORDS[name]:
        for column in there:
            other = column in taken or (name != 'mask' and column in masks)
            if word in column.lower() and not other:
                return column
    return None
