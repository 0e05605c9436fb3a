"""The cycle as a metric."""

from __future__ import annotations

import pytest
import torch

from projects.llava_sam2_rl.evaluation import CycleMetric


def frame(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_j_is_the_mean_over_the_frames_of_clips():
    whole, left, nothing = frame([1, 1]), frame([1, 0]), frame([0, 0])
    sample = {
        'caption': 'a cat',
        'reference': None,
        'caption_return': None,
        'gt_mask': whole,
        'target_mask': whole,
        'masks': {'generated': whole},
        'attributes': None,
    }
    clip = {
        'gt': [whole, whole, nothing, nothing],
        # IoU 1, 1/2, both empty: 1, only one of them: 0.
        'generated': [whole, left, nothing, left],
        'reference': [left, left, left, left],
    }
    metric = CycleMetric()
    metric.process(None, [{**sample, 'tracks': clip}, {**sample, 'tracks': {}}])
    found = metric.compute_metrics(metric.results)
    assert found['return_j'] == pytest.approx((1 + 1 / 2 + 1 + 0) / 4)
    assert found['own_j'] == pytest.approx((1 / 2 + 1 / 2 + 0 + 0) / 4)
    # The picture alone has none.
    assert found['return_iou'] == 1.0
