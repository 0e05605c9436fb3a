"""The masks of grounded captions against the official evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from projects.llava_sam2_rl.evaluation import greedy_mask_miou


@pytest.mark.parametrize('image', range(3))
def test_the_official_evaluation_gives_the_same(root, image):
    with np.load(root / 'tests/data/metrics/golden.npz') as golden:
        found = greedy_mask_miou(golden[f'gcg_{image}/pred'], golden[f'gcg_{image}/gt'])
        assert found == pytest.approx(float(golden[f'gcg_{image}/miou']), abs=1e-6)


def test_the_best_pair_goes_first_and_leaves():
    """Pairs by hand, in a row of pixels: greedy is not the best sum."""

    def row(*pixels):
        mask = np.zeros((1, 1, 8), bool)
        mask[..., list(pixels)] = True
        return mask

    pred = np.concatenate([row(0, 1, 2, 3), row(0, 1)])
    gt = np.concatenate([row(0, 1, 2), row(2, 3, 4, 5)])
    # IoU: [[3/4, 2/6], [2/3, 0]]. 3/4 goes first, and what is left does not overlap.
    assert greedy_mask_miou(pred, gt) == pytest.approx(3 / 4)


def test_nothing_that_overlaps_is_zero():
    left, none = np.eye(4, dtype=bool)[None], np.zeros((0, 4, 4), bool)
    assert greedy_mask_miou(left, ~left) == 0
    assert greedy_mask_miou(none, left) == greedy_mask_miou(left, none) == 0
