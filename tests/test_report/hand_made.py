"""A run's folder written by hand: two starts, two validations, numbers chosen to be recognised."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

ATTACK = '<script>alert("x")</script> & \'quotes\' \u202e turned \x00 \ud800'
#: IoU of the way back by region, in the first and the latest validation.
IOU = {
    'scenes/a': (0.10, 0.80),  # gained 0.70
    'scenes/b': (0.90, 0.30),  # lost 0.60
    'scenes/c': (0.95, 0.99),
    'scenes/d': (0.02, 0.01),
    'scenes/e': (0.50, 0.52),
}


def write_lines(file: Path, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Lone surrogates are left to JSON's escapes, as the hook's own files have them.
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def train_row(step, reward, **others):
    return {'loss': 1.0, 'loop1/reward_mean': reward, **others, 'iter': step, 'step': step}


def rle(height, width, top, left, size):
    """COCO's run lengths, uncompressed list -> the page needs the compressed string."""
    from pycocotools import mask as coco

    mask = np.zeros((height, width), np.uint8, order='F')
    mask[top : top + size, left : left + size] = 1
    encoded = coco.encode(mask)
    return {'size': [height, width], 'counts': encoded['counts'].decode()}


def region(name, iou, caption='a red square', **others):
    return {
        'name': name,
        'reference': 'the reference',
        'caption': caption,
        'caption_return': None,
        'iou': iou,
        'own_iou': 0.5,
        'weights': 'policy',
        'image': f'{name[-1]}.jpg',
        'target_image': f'{name[-1]}.jpg',
        'region': rle(30, 40, 5, 5, 10),
        'target': rle(30, 40, 5, 5, 10),
        'found': rle(30, 40, 8, 8, 10),
        **others,
    }


def jpeg(height=30, width=40, noise=False):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8) if noise else None
    image = Image.fromarray(
        np.full((height, width, 3), 128, np.uint8) if pixels is None else pixels
    )
    buffer = io.BytesIO()
    image.save(buffer, format='jpeg')
    return buffer.getvalue()


def write_run(folder: Path, caption=ATTACK) -> Path:
    first = [train_row(10, 0.25), train_row(20, 0.5), train_row(30, 9.0), train_row(40, 9.0)]
    validation = {'cycle/return_iou': 0.494, 'cycle/other_iou': 0.2, 'time': 1.5, 'step': 0}
    abandoned = {'cycle/return_iou': 0.111, 'step': 40}
    write_lines(folder / '20260101_000000/vis_data/scalars.json', [validation, *first, abandoned])
    # Resumed from step 20.
    second = [train_row(30, 0.75, **{'loop1/kl_div': 0.0625}), train_row(40, 0.875)]
    latest = {'cycle/return_iou': 0.524, 'cycle/other_iou': 0.1, 'time': 1.5, 'step': 40}
    log = folder / '20260102_000000/vis_data/scalars.json'
    write_lines(log, [*second, latest])
    with log.open('a') as file:
        file.write('{"loss": 1.0, "it')  # killed here
    names = list(IOU)
    write_lines(
        folder / 'validations/iter_00000000.jsonl', [region(n, IOU[n][0], 'early') for n in names]
    )
    write_lines(
        folder / 'validations/iter_00000040.jsonl', [region(n, IOU[n][1], caption) for n in names]
    )
    with zipfile.ZipFile(folder / 'validations/images.zip', 'w') as archive:
        for name in names:
            archive.writestr(f'{name[-1]}.jpg', jpeg())
    for step, (one, two) in {20: (0.2, 0.4), 40: (0.6, None)}.items():
        write_lines(
            folder / f'rollouts/iter_{step:08d}.jsonl',
            [
                {
                    'direction': 'mask_to_caption',
                    'sample': sample,
                    'reward': value,
                    'rewards': {'mask_iou': value},
                }
                for sample, value in (('scenes/a', one), ('scenes/b', two))
            ],
        )
    counted = {'read': {'scenes': 90}, 'seconds': {'training steps': 60.0}, 'host_memory': 2**30}
    bad = [['scenes', 'empty <mask>', 3]]
    write_lines(
        folder / 'report/progress.jsonl',
        [
            {'start': 'A', 'from': 0, 'iter': 20, 'bad': bad, **counted},
            # Steps that the next start does again.
            {'start': 'A', 'from': 0, 'iter': 40, 'bad': [['scenes', 'x', 77]], **counted},
            {'start': 'B', 'from': 20, 'iter': 40, 'bad': bad, **counted},
        ],
    )
    run = {
        'config_file': 'tiny.py',
        'max_iters': 40,
        'starts': [{'start': 'A', 'from': 0}, {'start': 'B', 'from': 20}],
        'config_changes': {
            'file': [
                '+model.beta = 0.02',
                *('-train_cfg.max_iters = 400', '+train_cfg.max_iters = 200'),
            ],
            'run': ['-model.beta = 0.02', "+model.beta = '<b>'"],
        },
        'environment': {'torch': '2.5.1', 'git commit': 'abc'},
    }
    (folder / 'report/run.json').write_text(json.dumps(run))
    return folder
