"""`VideoObjectSegmentationMetric`: means over frames, expressions and kinds; what is handed in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import BadRecord
from projects.llava_sam2_rl.evaluation import VideoObjectSegmentationMetric, video_segmentation
from projects.llava_sam2_rl.inference import VideoSegmentation
from projects.llava_sam2_rl.structures import ClipSample

SIZE = (4, 6)
FULL, NONE = np.ones(SIZE, bool), np.zeros(SIZE, bool)
#: Twelve and six of 24 pixels; their boundaries are one and two columns apart.
HALF, QUARTER = NONE.copy(), NONE.copy()
HALF[:, :3] = True
QUARTER[:3, :2] = True


def encode(mask):
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def sample(number, gt, group=None, source='revos', foreground=None):
    height, width = gt[0].shape if gt is not None else SIZE
    return ClipSample(
        source=source,
        sample_id=f'clip/{number}',
        video='clip',
        expression=str(number),
        caption='the dog',
        frames=tuple(Path(f'{t:05d}.jpg') for t in range(len(gt) if gt is not None else 2)),
        height=height,
        width=width,
        masks=None if gt is None else tuple(encode(m) if m.any() else None for m in gt),
        foreground=None if foreground is None else tuple(map(encode, foreground)),
        group=group,
    )


def answer(masks, text='It is [SEG].'):
    rles = [[encode(m)] if '[SEG]' in text else [] for m in masks]
    return VideoSegmentation(text, True, masks[0].shape, rles)


def evaluate(pairs, size=None, skipped=(), **options):
    metric = VideoObjectSegmentationMetric(**options)
    for number, (meta, prediction) in enumerate(pairs):
        data = {'skipped': skipped if number == 0 else ()}
        metric.process({'data': data, 'data_samples': [meta]}, [prediction])
    return metric.evaluate(len(pairs) if size is None else size), metric


def test_the_official_numbers_of_three_clips(root):
    """Mean over the frames of each clip, then over clips."""
    pairs, expected = [], {'J': [], 'F': [], 'accuracy': [], 'robustness': []}
    with np.load(root / 'tests/data/metrics/golden.npz') as golden:
        for i in range(3):
            gt, pred, foreground = (golden[f'video_{i}/{k}'] for k in ('gt', 'pred', 'foreground'))
            pairs.append((sample(i, gt, foreground=foreground), answer(pred)))
            for key, values in expected.items():
                values.append(golden[f'video_{i}/{key}'].mean())
    found, metric = evaluate(pairs)
    for key, values in expected.items():
        assert found[f'video/revos/{key.lower()}'] == pytest.approx(np.mean(values), abs=1e-6)
    both = (np.mean(expected['J']) + np.mean(expected['F'])) / 2
    assert found['video/revos/j&f'] == pytest.approx(both, abs=1e-6)
    assert [row['j'] for row in metric.rows] == pytest.approx(expected['J'], abs=1e-6)
    # Rows are written as JSON.
    assert json.loads(json.dumps(metric.rows[0]))['num_frames'] == 6


def test_kinds_of_expressions_count_alike_whatever_their_number():
    pairs = [
        (sample(0, [HALF, HALF], 'referring'), answer([HALF, HALF])),  # J 1
        (sample(1, [HALF, NONE], 'referring'), answer([QUARTER, NONE])),  # J (1/2 + 1) / 2
        (sample(2, [HALF, HALF], 'referring'), answer([NONE, HALF])),  # J (0 + 1) / 2
        (sample(3, [HALF, HALF], 'reasoning'), answer([HALF, HALF], 'No.')),  # J 0
    ]
    found, _ = evaluate(pairs)
    referring, reasoning = (1 + 3 / 4 + 1 / 2) / 3, 0.0
    assert found['video/revos/referring/j'] == pytest.approx(referring)
    assert found['video/revos/reasoning/j'] == reasoning
    assert found['video/revos/overall/j'] == pytest.approx((referring + reasoning) / 2)
    for key in ('f', 'j&f'):
        kinds = [found[f'video/revos/{kind}/{key}'] for kind in ('referring', 'reasoning')]
        assert found[f'video/revos/overall/{key}'] == pytest.approx(np.mean(kinds))
    assert found['video/revos/referring/j&f'] == pytest.approx(
        (found['video/revos/referring/j'] + found['video/revos/referring/f']) / 2
    )
    assert found['video/revos/overall/num_samples'] == 4
    assert found['video/revos/reasoning/no_seg'] == found['video/revos/overall/no_seg'] == 1
    assert not any('accuracy' in key for key in found)


def test_accuracy_and_robustness_by_hand():
    """Six false pixels of twelve; the foreground of the second frame is twice as large."""
    wide = HALF | QUARTER
    pairs = [
        (sample(0, [QUARTER, QUARTER], foreground=[wide, FULL]), answer([HALF, HALF])),
    ]
    found, _ = evaluate(pairs)
    assert found['video/revos/accuracy'] == pytest.approx(18 / 24)
    assert found['video/revos/robustness'] == pytest.approx((1 - 6 / 12 + 1 - 6 / 24) / 2)


def test_nothing_is_counted_twice_and_what_breaks_late_is_left_out():
    """A stand-in and a sampler's padding repeat; a clip whose frame cannot be decoded is named."""
    bad = BadRecord('corrupt_image', 'revos/clip/2')
    pairs = [
        (sample(0, [HALF]), answer([HALF])),
        (sample(1, [HALF]), answer([NONE])),
        (sample(2, [HALF]), bad),
        (sample(0, [HALF]), answer([HALF])),  # stands in for the bad record 3
        (sample(0, [HALF]), answer([HALF])),  # padding
    ]
    found, metric = evaluate(pairs, size=4, skipped=[('revos', 'clip/3', 'missing_image')])
    assert found['video/revos/num_samples'] == 2
    assert found['video/revos/j'] == 0.5
    assert metric.skipped == [
        ('revos', 'clip/2', 'corrupt_image'),
        ('revos', 'clip/3', 'missing_image'),
    ]
    assert [row['sample_id'] for row in metric.rows] == ['clip/0', 'clip/1']


def test_a_benchmark_that_keeps_its_masks_gets_png_files(tmp_path):
    metric = VideoObjectSegmentationMetric(submission=True)
    metric.work_dir = tmp_path
    pairs = [
        (sample(0, None, source='mevis'), answer([HALF, NONE])),
        (sample(1, None, source='mevis'), answer([HALF, HALF], 'There is none.')),
    ]
    for meta, prediction in pairs:
        metric.process({'data': {}, 'data_samples': [meta]}, [prediction])
    found = metric.evaluate(2)
    assert found == {'video/mevis/no_seg': 1, 'video/mevis/num_samples': 2}
    folder = tmp_path / 'submission/mevis/Annotations/clip'
    files = {p.relative_to(folder).as_posix(): np.array(Image.open(p)) for p in folder.rglob('*.*')}
    assert sorted(files) == ['0/00000.png', '0/00001.png', '1/00000.png', '1/00001.png']
    assert np.array_equal(files['0/00000.png'], 255 * HALF)
    assert not files['0/00001.png'].any()
    assert not files['1/00000.png'].any()
    assert all(mask.shape == SIZE for mask in files.values())


def test_without_masks_there_is_no_score_and_that_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(video_segmentation, 'print_log', lambda text, **_: said.append(text))
    found, _ = evaluate([(sample(0, None, source='mevis'), answer([HALF, NONE]))])
    assert not any(key.endswith(('/j', '/f')) for key in found)
    assert 'mevis has no masks to compare with' in said[0]
    assert 'submission=True' in said[0]
