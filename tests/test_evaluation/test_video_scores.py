"""J, F, A and R: against the official functions, and against their definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from projects.llava_sam2_rl.evaluation.video_scores import (
    boundary,
    boundary_measure,
    pixel_accuracy,
    region_similarity,
    robustness,
)


@pytest.fixture(scope='module', params=range(3))
def golden_clip(request, root):
    with np.load(root / 'tests/data/metrics/golden.npz') as arrays:
        prefix = f'video_{request.param}/'
        return {k.removeprefix(prefix): arrays[k] for k in arrays if k.startswith(prefix)}


def test_the_official_functions_give_the_same(golden_clip):
    gt, pred, foreground = (golden_clip[key] > 0 for key in ('gt', 'pred', 'foreground'))
    frames = range(len(gt))
    found = {
        'J': [region_similarity(pred[t], gt[t]) for t in frames],
        'F': [boundary_measure(pred[t], gt[t]) for t in frames],
        'accuracy': [pixel_accuracy(pred[t], gt[t]) for t in frames],
        'robustness': [robustness(pred[t], gt[t], foreground[t]) for t in frames],
    }
    for key, values in found.items():
        assert values == pytest.approx(golden_clip[key], abs=1e-6), key


def slow_edge(mask):
    """Pixels that differ from a neighbour to the right, below, or to the right below."""
    # Beyond the last row and column the mask goes on as it ends.
    more = np.pad(mask, ((0, 1), (0, 1)), 'edge')
    return np.argwhere((mask != more[:-1, 1:]) | (mask != more[1:, :-1]) | (mask != more[1:, 1:]))


def slow_f(pred, gt):
    reach = math.ceil(0.008 * math.sqrt(pred.shape[0] ** 2 + pred.shape[1] ** 2))

    def share(pixels, others):
        steps = pixels[:, None] - others
        return ((steps**2).sum(axis=2).min(axis=1) <= reach**2).mean()

    mine, true = slow_edge(pred), slow_edge(gt)
    if not len(mine) and not len(true):
        return 1.0
    if not len(mine) or not len(true):
        return 0.0
    precision, recall = share(mine, true), share(true, mine)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def slow_j(pred, gt):
    mine, true = ({(int(y), int(x)) for y, x in np.argwhere(m)} for m in (pred, gt))
    return len(mine & true) / len(mine | true) if mine | true else 1.0


def random_mask(rng, height, width):
    """Nothing, everything, or a box with some noise."""
    kind = rng.integers(8)
    mask = np.zeros((height, width), bool)
    if kind == 0:
        return mask
    if kind == 1:
        return ~mask
    top, left = rng.integers(height), rng.integers(width)
    mask[top : top + rng.integers(2, height), left : left + rng.integers(2, width)] = True
    return mask ^ (rng.random(mask.shape) < rng.choice([0.0, 0.02]))


def test_fifty_random_clips_by_the_definition():
    rng = np.random.default_rng(0)
    reaches, values = set(), []
    for _ in range(50):
        # Diagonals up to 300 pixels: the tolerance is 1, 2 or 3.
        height, width = int(rng.integers(8, 40)), int(rng.integers(8, 300))
        reaches.add(math.ceil(0.008 * math.hypot(height, width)))
        gt = [random_mask(rng, height, width) for _ in range(3)]
        pred = [np.roll(m, int(rng.integers(6)), 1) if rng.random() < 0.7 else ~m for m in gt]
        j = np.mean([region_similarity(p, g) for p, g in zip(pred, gt, strict=True)])
        f = np.mean([boundary_measure(p, g) for p, g in zip(pred, gt, strict=True)])
        slow = np.mean([(slow_j(p, g) + slow_f(p, g)) / 2 for p, g in zip(pred, gt, strict=True)])
        assert (j + f) / 2 == pytest.approx(slow, abs=1e-6)
        values.append(slow)
    assert reaches == {1, 2, 3}
    assert min(values) < 0.4 < 0.9 < max(values)


def test_the_boundary_by_hand():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2:4] = True
    expected = [
        [0, 1, 1, 1, 0],
        [0, 1, 0, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    assert np.array_equal(boundary(mask), np.array(expected, bool))
    # What lies beyond the frame is no neighbour.
    assert not boundary(np.ones((3, 3), bool)).any()


def test_a_frame_without_a_boundary():
    """As officially: the whole frame has none, so F cannot tell it from nothing, but J does."""
    full, none = np.ones((5, 5), bool), np.zeros((5, 5), bool)
    half = np.arange(25).reshape(5, 5) < 10
    assert boundary_measure(full, none) == 1.0
    assert region_similarity(full, none) == 0.0
    assert boundary_measure(half, none) == boundary_measure(none, half) == 0.0
    assert boundary_measure(none, none) == region_similarity(none, none) == 1.0


def test_robustness_by_hand():
    none, two, four = (np.arange(12).reshape(3, 4) < n for n in (0, 2, 4))
    assert robustness(four, two, four) == pytest.approx(0.5)
    assert robustness(two, four, four) == 1.0
    assert robustness(two, none, none) == 0.0
    assert robustness(none, none, none) == 1.0
    assert pixel_accuracy(four, two) == pytest.approx(10 / 12)


@pytest.mark.parametrize('score', [region_similarity, boundary_measure, pixel_accuracy])
def test_masks_of_other_sizes_are_refused(score):
    with pytest.raises(ValueError, match=r'\(3, 4\) and \(4, 3\)'):
        score(np.ones((3, 4), bool), np.ones((4, 3), bool))
