"""A user's own data: real photographs with masks and captions, in each of the formats."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import Photographs
from projects.llava_sam2_rl.structures import RegionSample


def photographs() -> list[tuple[str, RegionSample]]:
    """Every outlined object of the photographs of scikit-image, and its picture's name."""
    data = Photographs()
    rng = np.random.default_rng(0)
    samples = [data.read(index, rng) for index in range(len(data))]
    return [(sample.sample_id.split('-')[0], sample) for sample in samples]


def rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run-length code."""
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': list(mask.shape), 'counts': code['counts'].decode()}


def outlines(mask: np.ndarray) -> list[list[int]]:
    """Polygons of a mask without holes."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [outline.ravel().tolist() for outline in found if len(outline) >= 3]


def _save_images(folder: Path, regions: Sequence[tuple[str, RegionSample]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, sample in dict(regions).items():
        Image.fromarray(sample.image).save(folder / f'{name}.jpg', quality=95)


def _save_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def write_folder(root: Path, regions: Sequence[tuple[str, RegionSample]]) -> list[str]:
    """``NAME.jpg``, ``NAME.mask1.png``, ``NAME.mask1.txt``."""
    _save_images(root / 'photos', regions)
    for number, (name, sample) in enumerate(regions):
        _save_mask(root / f'photos/{name}.mask{number}.png', sample.mask)
        (root / f'photos/{name}.mask{number}.txt').write_text(f'{sample.caption}\n')
    return ['--images', 'photos']


def write_jsonl(root: Path, regions: Sequence[tuple[str, RegionSample]]) -> list[str]:
    """Masks as files, outlines and run-length codes by turns."""
    _save_images(root / 'photos', regions)
    lines = []
    for number, (name, sample) in enumerate(regions):
        mask: Any = f'masks/{number}.png'
        _save_mask(root / mask, sample.mask)
        mask = (mask, rle(sample.mask), outlines(sample.mask))[number % 3]
        lines.append({'image': f'{name}.jpg', 'mask': mask, 'caption': sample.caption})
    (root / 'regions.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    return ['--images', 'photos', '--annotations', 'regions.jsonl']


def coco(regions: Sequence[tuple[str, RegionSample]]) -> dict[str, Any]:
    """A COCO file of instances."""
    names = list(dict(regions))
    shapes = {name: sample.image.shape for name, sample in regions}
    images = [
        {'id': i, 'file_name': f'{n}.jpg', 'height': shapes[n][0], 'width': shapes[n][1]}
        for i, n in enumerate(names, 1)
    ]
    annotations = [
        {
            **{'id': 100 + i, 'image_id': 1 + names.index(name), 'category_id': 1, 'iscrowd': 0},
            'segmentation': rle(sample.mask) if i % 2 else outlines(sample.mask),
        }
        for i, (name, sample) in enumerate(regions)
    ]
    categories = [{'id': 1, 'name': 'object'}]
    return {'images': images, 'annotations': annotations, 'categories': categories}


def write_coco(root: Path, regions: Sequence[tuple[str, RegionSample]]) -> list[str]:
    """Instances, and captions by the annotations' ids in a CSV file."""
    _save_images(root / 'photos', regions)
    (root / 'instances.json').write_text(json.dumps(coco(regions)))
    with open(root / 'captions.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['annotation_id', 'caption'])
        writer.writerows([100 + i, sample.caption] for i, (_, sample) in enumerate(regions))
    return ['--images', 'photos', '--annotations', 'instances.json', '--captions', 'captions.csv']


def write_hugging_face(root: Path, regions: Sequence[tuple[str, RegionSample]]) -> list[str]:
    """``save_to_disk``, with a column name of one's own."""
    _hugging_face(regions).save_to_disk(str(root / 'saved'))
    return ['--annotations', 'saved']


def write_parquet(root: Path, regions: Sequence[tuple[str, RegionSample]]) -> list[str]:
    """The same in a parquet file."""
    _hugging_face(regions).to_parquet(str(root / 'regions.parquet'))
    return ['--annotations', 'regions.parquet']


def _hugging_face(regions: Sequence[tuple[str, RegionSample]]) -> Any:
    import datasets

    features = datasets.Features(
        photo=datasets.Image(), segmentation_mask=datasets.Image(), text=datasets.Value('string')
    )
    rows = {
        'photo': [Image.fromarray(sample.image) for _, sample in regions],
        'segmentation_mask': [Image.fromarray(sample.mask) for _, sample in regions],
        'text': [sample.caption for _, sample in regions],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def write_sa2va(root: Path, regions: Sequence[tuple[str, RegionSample]]) -> list[str]:
    """The official fine-tuning format."""
    _save_images(root / 'photos', regions)
    entries = [
        {
            'image': f'{name}.jpg',
            'mask': [outlines(s.mask) for n, s in regions if n == name],
            'text': [s.caption for n, s in regions if n == name],
        }
        for name in dict(regions)
    ]
    (root / 'annotations.json').write_text(json.dumps(entries))
    return ['--images', 'photos', '--annotations', 'annotations.json']


Writer = Callable[[Path, Sequence[tuple[str, RegionSample]]], list[str]]
#: Writes the files of a format below a folder and returns the arguments of tools/new_config.py.
FORMATS: dict[str, Writer] = {
    'folder': write_folder,
    'jsonl': write_jsonl,
    'coco': write_coco,
    'hugging_face': write_hugging_face,
    'parquet': write_parquet,
    'sa2va': write_sa2va,
}
