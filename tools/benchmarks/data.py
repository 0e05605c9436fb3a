"""The data path against plain PIL: decoding, both inputs, masks."""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import Photographs, Sa2VATransform
from projects.llava_sam2_rl.datasets.records import decode_rle, fit_mask, read_image
from projects.llava_sam2_rl.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, resize_bicubic
from projects.llava_sam2_rl.structures import RegionSample

#: (file, COCO run-length code of a region)
Record = tuple[Path, dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py data``."""
    parser.add_argument(
        '--side', type=int, default=1024, help='longer side of the photographs (default: 1024)'
    )
    parser.add_argument(
        '--rounds', type=int, default=15, help='timed rounds over the photographs (default: 15)'
    )
    parser.add_argument(
        '--workers',
        type=int,
        default=2,
        help='processes of the throughput row; 0 leaves it out (default: 2)',
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the stages and the whole, baseline and ours in turns.

    Returns:
        Rows with ``name``, ``baseline_s`` and ``ours_s`` (median seconds a photograph, one
        thread), ``ratio``; the row of the whole has ``mean_abs_diff`` too, of the 448 input in
        levels of 255, and the row of several processes is wall time over all of them.
    """
    threads = torch.get_num_threads(), cv2.getNumThreads()
    # As inside a loader's process.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _rows(_photographs(Path(folder), args.side), args.rounds, args.workers)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _rows(records: list[Record], rounds: int, workers: int) -> list[dict[str, Any]]:
    images = [plain_read(path) for path, _ in records]
    pictures = [Image.fromarray(image) for image in images]
    transform = Sa2VATransform()

    def each(function: Callable[[int], Any]) -> Callable[[], None]:
        def all_of_them() -> None:
            for i in range(len(records)):
                function(i)

        return all_of_them

    stages: list[tuple[str, Callable[[int], Any], Callable[[int], Any]]] = [
        ('decode', lambda i: plain_read(records[i][0]), lambda i: read_image(records[i][0], '')),
        (
            'resize to 448',
            lambda i: np.asarray(pictures[i].resize((448, 448))),
            lambda i: resize_bicubic(images[i], 448, 448),
        ),
        (
            'resize to 1024',
            lambda i: np.asarray(pictures[i].resize((1024, 1024))),
            lambda i: resize_bicubic(images[i], 1024, 1024, exact=False),
        ),
        (
            'whole transform',
            lambda i: plain_item(*records[i]),
            lambda i: our_item(*records[i], transform),
        ),
    ]
    rows = []
    for name, baseline, ours in stages:
        seconds = _in_turns(each(baseline), each(ours), rounds)
        rows.append(_row(name, *(value / len(records) for value in seconds)))
    rows[-1]['mean_abs_diff'] = max(_difference(*record, transform) for record in records)
    if workers:
        seconds = _in_turns(
            lambda: _load(records, plain_item, workers),
            lambda: _load(records, our_item, workers),
            3,
        )
        rows.append(_row(f'whole transform, {workers} processes', *seconds))
    return rows


def _row(name: str, baseline: float, ours: float) -> dict[str, Any]:
    return {'name': name, 'baseline_s': baseline, 'ours_s': ours, 'ratio': baseline / ours}


def _in_turns(
    baseline: Callable[[], Any], ours: Callable[[], Any], rounds: int
) -> tuple[float, float]:
    """Median seconds of each, after one warm-up; turns, so that a busy moment hits both.

    A function that returns a number has timed itself.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for function, kept in zip((baseline, ours), times):
            started = time.perf_counter()
            own = function()
            if turn:
                kept.append(time.perf_counter() - started if own is None else own)
    return statistics.median(times[0]), statistics.median(times[1])


# -- the two paths -------------------------------------------------------------------------------


def plain_read(path: Path) -> np.ndarray:
    """PIL's decoding as (H, W, 3) uint8."""
    with Image.open(path) as picture:
        return np.array(picture.convert('RGB'))


def plain_item(path: Path, rle: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What :class:`Sa2VATransform` makes of a record, step by step with PIL."""
    image = plain_read(path)
    mask = coco_mask.decode(rle).astype(bool)
    picture = Image.fromarray(image)
    pixels = torch.from_numpy(np.array(picture.resize((448, 448)))).permute(2, 0, 1)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    grounding = torch.from_numpy(np.array(picture.resize((1024, 1024))))
    masks = torch.from_numpy(np.array(mask[None]))
    if not masks.any():
        raise ValueError(f'{path}: empty mask')
    grid = F.interpolate(masks[None].float(), size=(16, 16), mode='nearest')[0].bool()
    return {
        'pixel_values': pixels.float().div(255).sub(mean).div(std).contiguous()[None],
        'g_pixel_values': grounding.permute(2, 0, 1).contiguous(),
        'prompt_masks': grid,
        'masks': masks,
    }


def our_item(
    path: Path, rle: dict[str, Any], transform: Sa2VATransform | None = None
) -> dict[str, Any]:
    """The same by this package: as a data source reads it, then the transform."""
    image = read_image(path, 'benchmark')
    mask = fit_mask(decode_rle(rle, 'benchmark'), image, 'benchmark')
    return (transform or Sa2VATransform())(RegionSample(image, mask))


def _difference(path: Path, rle: dict[str, Any], transform: Sa2VATransform) -> float:
    scale = torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
    values = [item['pixel_values'] for item in (plain_item(path, rle), our_item(path, rle))]
    return float(((values[0] - values[1]).abs() * scale).mean())


class _Items(torch.utils.data.Dataset):
    def __init__(self, records: list[Record], make: Callable[..., Any], copies: int) -> None:
        self.records = records * copies
        self.make = make

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> int:
        # The item stays where it was made: handing it over costs both paths the same.
        return self.make(*self.records[index])['masks'].shape[-1]


def _load(records: list[Record], make: Callable[..., Any], workers: int) -> float:
    """Wall seconds a photograph, without the start of the processes."""
    loader = torch.utils.data.DataLoader(
        _Items(records, make, 10), batch_size=None, num_workers=workers, prefetch_factor=4
    )
    items = iter(loader)
    for _ in range(4 * workers):
        next(items)
    started = time.perf_counter()
    count = sum(1 for _ in items)
    return (time.perf_counter() - started) / count


# -- photographs ---------------------------------------------------------------------------------


def _photographs(folder: Path, side: int) -> list[Record]:
    """The photographs of scikit-image as JPEG files of that longer side, with a region each."""
    records = []
    seen: set[bytes] = set()
    for item in Photographs():
        sample: RegionSample = item['sample']
        height, width = sample.image.shape[:2]
        if (key := sample.image[:8].tobytes()) in seen:
            continue
        seen.add(key)
        scale = side / max(height, width)
        size = round(width * scale), round(height * scale)
        path = folder / f'{len(records)}.jpg'
        file = io.BytesIO()
        Image.fromarray(sample.image).resize(size).save(file, 'JPEG', quality=90)
        path.write_bytes(file.getvalue())
        mask = np.asarray(Image.fromarray(sample.mask).resize(size))
        records.append((path, coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))))
    return records
