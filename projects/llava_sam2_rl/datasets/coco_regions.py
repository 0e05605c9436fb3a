"""Objects of a COCO annotation file, with captions from wherever they were written."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.index_cache import cached_index
from projects.llava_sam2_rl.datasets.json_rows import (
    JSONRows,
    iterate_rows,
    load_json,
    pack_rows,
    read_bytes,
)
from projects.llava_sam2_rl.datasets.records import (
    file_below,
    fit_mask,
    read_image,
    required_file,
    segmentation_to_mask,
)
from projects.llava_sam2_rl.datasets.regions import draw_caption
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

_ID_KEYS = ('annotation_id', 'ann_id', 'id')
_TEXT_KEYS = ('caption', 'text', 'description')


@DATASETS.register_module()
class COCORegionDataset(RegionDataset):
    """One record per object of a COCO annotation file; of several captions one is drawn each time.

    Captions are optional. They are looked for in ``captions``, in a list ``captions`` beside
    ``annotations`` in the file itself (``[{"annotation_id": …, "caption": …}, …]``), and in each
    annotation (``"caption": …``), in this order.

    Args:
        ann_file: COCO's JSON: ``images``, ``annotations`` with a ``segmentation``, ``categories``.
        image_dir: Folder that the pictures' ``file_name`` is below.
        captions: A CSV file with a header, a JSONL file or a JSON list, with a row for each
            caption: the annotation's id as ``annotation_id``, ``ann_id`` or ``id``, its text as
            ``caption``, ``text`` or ``description``. Defaults to none.
        crowds: Takes crowds (``iscrowd``) too. Defaults to False.
        cache_dir: Folder of the index, see `cached_index`.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is not as above, or no caption belongs to any object.
    """

    def __init__(
        self,
        ann_file: str,
        image_dir: str,
        captions: str | None = None,
        crowds: bool = False,
        cache_dir: str | None = None,
        source: str = 'coco_regions',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        path = required_file(Path(ann_file), "ann_file is COCO's JSON of object instances")
        texts = None if captions is None else Path(captions)
        if texts is not None:
            required_file(texts, 'captions has a row with annotation_id and caption for each')
        self.image_dir = Path(image_dir)
        self._rows = JSONRows(
            cached_index(
                [path] if texts is None else [path, texts],
                lambda: pack_rows(_objects(path, texts, crowds)),
                f'coco-{path.stem}{"-crowds" if crowds else ""}',
                cache_dir,
            )
        )
        if not len(self._rows):
            raise ValueError(f'{ann_file} holds no object that is no crowd')

    @property
    def num_records(self) -> int:
        """Objects."""
        return len(self._rows)

    def sample_id(self, index: int) -> str:
        """The annotation's id."""
        return str(self._rows.read(index, '')['id'])

    def image_key(self, index: int) -> str:
        """The picture's name."""
        return str(self._rows.read(index, '')['file_name'])

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads an object.

        Raises:
            BadRecord: ``missing_image``, ``bad_size``, or as `segmentation_to_mask`, `read_image`,
                `fit_mask` and `draw_caption`.
        """
        row = self._rows.read(index, '')
        name = f'{self.source}/{row["id"]}'
        file_name, size = row['file_name'], (row['height'], row['width'])
        if not isinstance(file_name, str):
            raise BadRecord('missing_image', name, f'no image {row["image_id"]!r} is described')
        if not all(isinstance(side, (int, float)) and 0 < side < 1e6 for side in size):
            raise BadRecord('bad_size', name, f'{size[0]!r:.40} x {size[1]!r:.40}')
        mask = segmentation_to_mask(row['segmentation'], int(size[0]), int(size[1]), name)
        path = file_below(self.image_dir, file_name, name)
        image = read_image(path, name, annotated=(mask.shape[0], mask.shape[1]))
        return RegionSample(
            image=image,
            mask=fit_mask(mask, image, name),
            caption=draw_caption(row['captions'], rng, name),
            source=self.source,
            sample_id=str(row['id']),
            category=row['category'] if isinstance(row['category'], str) else None,
        )


def _objects(path: Path, captions_path: Path | None, crowds: bool) -> Iterator[tuple[int, bytes]]:
    """The rows of the index."""
    data = load_json(path)
    check_instances(data, path)
    given: Any = data.get('captions')
    if captions_path is not None:
        captions = read_captions(captions_path)
    elif isinstance(given, (list, dict)):
        captions = _captions_by_id(_rows_of(given), path)
    else:
        captions = {}
    images = {image['id']: image for image in data['images'] if _has_id(image)}
    names = {c['id']: c.get('name') for c in data.get('categories') or () if _has_id(c)}
    found = 0
    for number, annotation in enumerate(data['annotations']):
        if not isinstance(annotation, dict) or (annotation.get('iscrowd') and not crowds):
            continue
        key = annotation.get('id', number)
        # What is missing or of another kind makes a bad record when it is read, not here.
        image = images.get(annotation.get('image_id'), {})
        own = captions.get(str(key))
        found += own is not None
        row = {
            'id': key,
            'image_id': annotation.get('image_id'),
            'file_name': image.get('file_name'),
            'height': image.get('height'),
            'width': image.get('width'),
            'segmentation': annotation.get('segmentation'),
            'category': names.get(annotation.get('category_id')),
            'captions': annotation.get('caption', annotation.get('captions'))
            if own is None
            else own,
        }
        yield number, json.dumps(row).encode()
    if captions and not found:
        raise ValueError(
            f'none of {len(captions)} captions of {captions_path or path} belongs to an annotation '
            f'of {path}: the first is of annotation {next(iter(captions))!r}. Captions go by the '
            "annotations' ids, not by the images'"
        )
    if found < len(captions):
        print_log(
            f'{captions_path or path}: {len(captions) - found} of {len(captions)} captions belong '
            f'to no object of {path}',
            logger='current',
            level=logging.WARNING,
        )


def check_instances(data: Any, path: Path) -> None:
    """Refuses what is no COCO file of objects.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), list) for key in ('images', 'annotations')
    ):
        raise ValueError(f"{path} is no COCO file: it needs the lists 'images' and 'annotations'")
    objects = [x for x in data['annotations'] if isinstance(x, dict)]
    if objects and not any('segmentation' in x for x in objects):
        raise ValueError(
            f'{path}: no annotation has a segmentation, only {", ".join(sorted(objects[0]))}. COCO '
            'files of captions describe whole images; take the one of instances'
        )


def _has_id(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get('id'), (int, str))


def read_captions(path: Path) -> dict[str, list[Any]]:
    """Captions by the id of their annotation, from a CSV, JSONL or JSON file.

    Raises:
        ValueError: A column is missing; the message names those there are.
    """
    if path.suffix.lower() in ('.csv', '.tsv'):
        # Bytes of other encodings stay recognisable, so that their records can be named.
        text = read_bytes(path).decode('utf-8', 'surrogateescape')
        separator = '\t' if path.suffix.lower() == '.tsv' else ','
        lines = csv.DictReader(io.StringIO(text, newline=''), delimiter=separator)
        usual = csv.field_size_limit(len(text) + 1)
        try:
            rows: list[Any] = list(lines)
        except csv.Error as error:
            raise ValueError(f'{path}, line {lines.line_num}: {error}') from error
        finally:
            csv.field_size_limit(usual)
    else:
        rows = []
        for number, line in iterate_rows(path):
            try:
                rows.append(json.loads(line.decode('utf-8', 'surrogateescape')))
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{path}, line {number} is no JSON: {error}') from error
    return _captions_by_id(rows, path)


def _rows_of(captions: list[Any] | dict[str, Any]) -> list[Any]:
    if isinstance(captions, list):
        return captions
    return [{'annotation_id': key, 'caption': text} for key, text in captions.items()]


def _captions_by_id(rows: list[Any], path: Path) -> dict[str, list[Any]]:
    captions: dict[str, list[Any]] = {}
    for number, row in enumerate(rows, 1):
        keys = list(row) if isinstance(row, Mapping) else []
        key = next((key for key in _ID_KEYS if key in keys), None)
        text = next((key for key in _TEXT_KEYS if key in keys), None)
        if key is None or text is None:
            there = ', '.join(map(repr, keys)) or repr(row)[:40]
            raise ValueError(
                f'{path}, caption {number} has {there}: it needs annotation_id (or ann_id, id) and '
                'caption (or text, description)'
            )
        value = row[text]
        captions.setdefault(str(row[key]).strip(), []).extend(
            value if isinstance(value, list) else [value]
        )
    return captions
