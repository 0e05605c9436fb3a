"""cIoU, gIoU and precisions against a plain computation by pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from projects.llava_sam2_rl.evaluation import ReferringSegmentationMetric
from projects.llava_sam2_rl.models.free_generation import SegmentationAnswer
from projects.llava_sam2_rl.structures import RegionMeta


def meta(number, source='a', text='it', size=(4, 4)):
    return RegionMeta(source, str(number), text, None, *size)


def evaluate(samples, skipped=(), size=None, batch=7):
    """``samples``: ``(meta, predicted mask, true mask, number of [SEG])``."""
    metric = ReferringSegmentationMetric()
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        data_batch = {
            'data': {'skipped': skipped if start == 0 else ()},
            'data_samples': [m for m, *_ in part],
        }
        predictions = [
            {
                'answer': SegmentationAnswer(
                    'It is [SEG].' * n, torch.from_numpy(pred), n, torch.from_numpy(pred)[None]
                ),
                'gt_mask': torch.from_numpy(gt),
            }
            for _, pred, gt, n in part
        ]
        metric.process(data_batch, predictions)
    return metric.evaluate(len(samples) if size is None else size), metric


def test_a_thousand_random_pairs_empties_included():
    """The official convention, written down once more: I / (U + eps) and 1 where U is 0."""
    rng = np.random.default_rng(0)
    samples, ious, intersections, unions = [], [], 0, 0
    for i in range(1000):
        height, width = rng.integers(1, 40, 2)
        pred = rng.random((height, width)) < rng.choice([0.0, 0.2, 0.7, 1.0])
        # Often alike, so that every threshold is crossed.
        gt = pred ^ (rng.random(pred.shape) < rng.choice([0.0, 0.1, 0.3]))
        gt = np.zeros_like(gt) if rng.random() < 0.05 else gt
        samples.append((meta(i, size=pred.shape), pred, gt, int(pred.any())))
        rle = [coco.encode(np.asfortranarray(m.astype(np.uint8))) for m in (pred, gt)]
        union = int(coco.area(coco.merge(rle)))
        intersection = int(coco.area(coco.merge(rle, intersect=True)))
        ious.append(intersection / union if union else 1.0)
        intersections, unions = intersections + intersection, unions + union
    found, _ = evaluate(samples)
    assert found['referring/a/ciou'] == pytest.approx(intersections / unions, abs=1e-6)
    assert found['referring/a/giou'] == pytest.approx(sum(ious) / 1000, abs=1e-6)
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        share = sum(iou >= threshold for iou in ious) / 1000
        assert 0.05 < share < 0.95
        assert found[f'referring/a/p@{threshold}'] == share
    assert found['referring/a/num_samples'] == 1000
    empties = sum(not pred.any() and not gt.any() for _, pred, gt, _ in samples)
    assert empties > 20


def test_by_hand():
    """Two samples: 1 of 2 pixels and 7 of 10; a third that is empty on both sides."""
    ten = np.arange(12).reshape(3, 4)
    samples = [
        (meta(1), ten < 2, ten < 1, 1),
        (meta(2), ten < 7, ten < 10, 1),
        (meta(3), ten < 0, ten < 0, 0),
    ]
    found, _ = evaluate(samples)
    assert found['referring/a/ciou'] == pytest.approx(8 / 12)
    assert found['referring/a/giou'] == pytest.approx((0.5 + 0.7 + 1) / 3)
    # An IoU of exactly 0.5 or 0.7 counts.
    assert [found[f'referring/a/p@0.{t}'] for t in (5, 6, 7, 8, 9)] == pytest.approx(
        [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3]
    )
    assert found['referring/a/no_seg'] == 1


def test_no_seg_is_an_empty_mask_against_an_object():
    full = np.ones((4, 4), bool)
    found, metric = evaluate([(meta(1), ~full, full, 0), (meta(2), full, full, 1)])
    assert found['referring/a/giou'] == 0.5
    assert found['referring/a/no_seg'] == 1
    assert [row['num_seg'] for row in metric.rows] == [0, 1]


def test_splits_stay_apart():
    full = np.ones((4, 4), bool)
    found, _ = evaluate(
        [(meta(1, 'val'), full, full, 1), (meta(1, 'testA'), ~full, full, 1)], batch=1
    )
    assert (found['referring/val/ciou'], found['referring/testA/ciou']) == (1.0, 0.0)


def test_nothing_is_counted_twice(caplog):
    """A stand-in for a bad record repeats another sample; padding repeats the first ones."""
    full = np.ones((4, 4), bool)
    samples = [
        (meta(1), full, full, 1),
        (meta(2), ~full, full, 1),
        (meta(1), full, full, 1),  # stands in for the bad record 3
        (meta(1), full, full, 1),  # a sampler's padding
    ]
    found, metric = evaluate(samples, skipped=[('a', '3', 'corrupt_image')], size=3)
    assert found['referring/a/num_samples'] == 2
    assert found['referring/a/giou'] == 0.5
    assert metric.skipped == [('a', '3', 'corrupt_image')]


def test_without_a_text_nothing_is_asked():
    full = np.ones((4, 4), bool)
    found, _ = evaluate([(meta(1), full, full, 1), (meta(2, text=None), ~full, full, 1)])
    assert found['referring/a/giou'] == 1.0
    assert found['referring/a/no_text'] == 1


def test_the_official_evaluation_gives_the_same(root):
    """Ten sentences of four images; some without a target, some without an answer."""
    samples = []
    with np.load(root / 'tests/data/metrics/golden.npz') as golden:
        for i in range(4):
            silent = golden[f'res_{i}/no_prediction']
            pairs = zip(golden[f'res_{i}/gt'] > 0, golden[f'res_{i}/pred'] > 0, silent, strict=True)
            for k, (gt, pred, none) in enumerate(pairs):
                pred = np.zeros_like(pred) if none else pred
                samples.append((meta(f'{i}-{k}', size=gt.shape), pred, gt, int(not none)))
        expected = float(golden['res/cIoU']), float(golden['res/gIoU'])
    found, _ = evaluate(samples)
    assert found['referring/a/num_samples'] == 10
    assert found['referring/a/ciou'] == pytest.approx(expected[0], abs=1e-6)
    assert found['referring/a/giou'] == pytest.approx(expected[1], abs=1e-6)
    assert found['referring/a/no_seg'] == 2
    # Image 1, sentence 0 has no target, but a mask; image 2, sentence 0 neither; image 3,
    # sentence 1 has a target and no mask.
    assert found['referring/a/num_no_target'] == 2
    assert found['referring/a/n_acc'] == 1 / 2
    assert found['referring/a/t_acc'] == 7 / 8


def test_the_two_accuracies_of_nothing_by_hand():
    full, none = np.ones((4, 4), bool), np.zeros((4, 4), bool)
    found, _ = evaluate(
        [
            (meta(1), none, none, 0),
            (meta(2), none, none, 1),  # a [SEG] whose mask is empty says nothing, too
            (meta(3), full, none, 1),
            (meta(4), full, full, 1),
            (meta(5), ~full, full, 0),
            (meta(6, 'b'), full, full, 1),
            (meta(7, 'c'), none, none, 0),
        ]
    )
    assert found['referring/a/n_acc'] == pytest.approx(2 / 3)
    assert found['referring/a/t_acc'] == 1 / 2
    assert found['referring/a/giou'] == pytest.approx(3 / 5)
    # The false pixels of a text without an object are part of cIoU's union.
    assert found['referring/a/ciou'] == pytest.approx(16 / 48)
    # Numbers that nothing speaks of are left out.
    assert 'referring/b/n_acc' not in found
    assert found['referring/c/n_acc'] == 1.0
    assert 'referring/c/t_acc' not in found
