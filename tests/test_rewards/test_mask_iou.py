import itertools

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from projects.llava_sam2_rl.rewards import RolloutBatch
from projects.llava_sam2_rl.rewards.mask_iou import (
    MaskIoUReward,
    intersection_and_union,
    iou_from_counts,
    iou_matrix,
    mask_iou,
    matched_iou,
    matched_ious,
    track_ious,
)


def box(rows, cols, size=4):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[rows, cols] = True
    return mask


def test_by_hand():
    left = box(slice(None), slice(0, 2))  # 8 pixels
    top = box(slice(0, 2), slice(None))  # 8 pixels, 4 shared
    one = box(slice(0, 1), slice(0, 1))
    pred = torch.stack([left, left, left])
    gt = torch.stack([top, left, one])
    iou = mask_iou(pred, gt)
    assert iou.dtype == torch.float32
    assert iou.tolist() == pytest.approx([4 / 12, 1.0, 1 / 8])


def test_empty_masks():
    empty = torch.zeros(4, 4, dtype=torch.bool)
    some = box(0, 0)
    assert mask_iou(empty, empty).tolist() == [1.0]
    assert mask_iou(some, empty).tolist() == [0.0]
    assert mask_iou(empty, some).tolist() == [0.0]
    assert mask_iou(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4)).shape == (0,)


def test_agrees_with_pycocotools():
    rng = np.random.default_rng(0)
    pred = rng.random((5, 30, 40)) > 0.6
    gt = rng.random((5, 30, 40)) > 0.4

    def encode(masks):
        return coco.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))

    expected = np.diag(coco.iou(encode(pred), encode(gt), [0] * 5))
    np.testing.assert_allclose(mask_iou(pred, gt).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32, torch.bfloat16, torch.int64])
def test_numbers_zero_and_one_are_masks(dtype):
    left, top = box(slice(None), slice(0, 2)), box(slice(0, 2), slice(None))
    assert mask_iou(left.to(dtype), top).tolist() == pytest.approx([1 / 3])


def test_counts_add_up_over_images():
    left, top = box(slice(None), slice(0, 2)), box(slice(0, 2), slice(None))
    intersection, union = intersection_and_union(
        torch.stack([left, left]), torch.stack([top, left])
    )
    assert intersection.tolist() == [4, 8]
    assert union.tolist() == [12, 8]
    assert iou_from_counts(intersection.sum(), union.sum()).item() == pytest.approx(12 / 20)


@pytest.mark.parametrize(
    ('pred', 'gt', 'message'),
    [
        (torch.full((4, 4), 255), torch.zeros(4, 4), 'only 0 and 1, got values from 255 to 255'),
        (torch.full((4, 4), 0.5), torch.zeros(4, 4), 'threshold it first'),
        (torch.zeros(4, 4), torch.zeros(4, 5), r'pred is \(1, 4, 4\) but gt is \(1, 4, 5\)'),
        (torch.zeros(4), torch.zeros(4), r'must be \(N, H, W\) or \(H, W\)'),
    ],
)
def test_what_is_no_pair_of_masks_is_an_error(pred, gt, message):
    with pytest.raises(ValueError, match=message):
        mask_iou(pred, gt)


def masks(*rows, width=8):
    """A mask per row of pixels."""
    found = torch.zeros(len(rows), 1, width, dtype=torch.bool)
    for mask, pixels in zip(found, rows):
        mask[0, list(pixels)] = True
    return found


def test_the_matrix_has_every_pair():
    rng = np.random.default_rng(0)
    pred, gt = torch.from_numpy(rng.random((3, 9, 7)) > 0.6), rng.random((2, 9, 7)) > 0.4
    pred[2], gt[1] = False, False
    found = iou_matrix(pred, gt)
    assert found.shape == (3, 2)
    for i, k in itertools.product(range(3), range(2)):
        assert found[i, k] == mask_iou(pred[i], gt[k])[0]
    assert found[2, 1] == 1.0
    assert iou_matrix(pred[:0], gt).shape == (0, 2)


def test_sets_are_matched_by_the_best_sum():
    pred = masks((0, 1, 2, 3), (0, 1))
    gt = masks((0, 1, 2), (2, 3, 4, 5))
    # IoU: [[3/4, 2/6], [2/3, 0]]. Greedily 3/4 + 0; together 2/6 + 2/3 are more.
    assert matched_iou(pred, gt) == pytest.approx((2 / 6 + 2 / 3) / 2)
    # The order of either set does not matter.
    assert matched_iou(pred.flip(0), gt) == matched_iou(pred, gt.flip(0)) == matched_iou(pred, gt)


def test_no_order_of_random_sets_is_better():
    rng = np.random.default_rng(1)
    for count in (1, 2, 4, 5):
        pred, gt = rng.random((count, 6, 6)) > 0.5, rng.random((count, 6, 6)) > 0.5
        best = max(
            float(mask_iou(pred[list(order)], gt).mean())
            for order in itertools.permutations(range(count))
        )
        assert matched_iou(pred, gt) == pytest.approx(best, abs=1e-6)


def test_a_mask_too_few_or_too_many_counts_as_missed():
    gt = masks((0, 1), (4, 5))
    assert matched_iou(masks((4, 5)), gt) == 1 / 2
    assert matched_iou(masks((4, 5), (0, 1), (6,)), gt) == pytest.approx(2 / 3)
    # Empty ones say nothing: they can neither be missed nor win anything.
    assert matched_iou(masks((4, 5), (0, 1), ()), gt) == 1
    assert matched_iou(masks((4, 5), (), ()), gt) == 1 / 2
    assert matched_iou(masks((4, 5)), masks((4, 5), ())) == 1


def test_nothing_is_found_by_nothing_alone():
    none, some = masks((), ()), masks((3,))
    for target in (none, none[:1], none[:0]):
        assert matched_iou(none[:1], target) == 1
        assert matched_iou(none[:0], target) == 1
        assert matched_iou(some, target) == 0
    assert matched_iou(none[:0], some) == matched_iou(none[:1], some) == 0


def test_sets_of_different_size_are_an_error():
    with pytest.raises(ValueError, match=r'pred is \(1, 1, 8\) but gt is \(1, 1, 9\)'):
        matched_iou(masks((1,)), masks((1,), width=9))


def test_many_sets_at_once():
    sets = [
        (masks((0, 1)), masks((1, 2))),  # 1 of 3
        (masks((4, 5), ()), masks((4, 5), (6,))),  # the second finds nothing of its own
        (masks(()), masks(())),
    ]
    found = matched_ious([pred for pred, _ in sets], [gt for _, gt in sets])
    assert found == pytest.approx([1 / 3, 1 / 2, 1])


def test_of_a_clip_it_is_the_mean_over_its_frames():
    """By hand: 1/3, 1 where both are empty, 0 where one is; the frames differ in size."""
    a, b = torch.zeros(1, 2, 3, dtype=torch.bool), torch.zeros(1, 2, 3, dtype=torch.bool)
    a[0, 0, :2] = b[0, 0, 1:] = True
    nothing, full = torch.zeros_like(a), torch.ones(1, 4, 4, dtype=torch.bool)
    tracks = [[a, nothing, full], [a]]
    found = [[b, nothing, ~full], [a]]
    assert track_ious(found, tracks) == pytest.approx([(1 / 3 + 1 + 0) / 3, 1.0])
    # Several regions: matched in each frame, so that their order says nothing.
    both = torch.cat([a, b])
    assert track_ious([[both.flip(0), both]], [[both, both]]) == [1.0]
    rollouts = RolloutBatch(
        completions=['x', 'y'],
        num_generations=2,
        direction='mask_to_caption',
        gt_masks=[a, a],
        pred_mask_logits=[-torch.ones(1, 2, 3)] * 2,
        gt_tracks=tracks,
        pred_tracks=found,
    )
    assert MaskIoUReward()(rollouts) == pytest.approx([4 / 9, 1.0])


def test_tracks_of_different_length_are_refused():
    mask = torch.zeros(1, 2, 3, dtype=torch.bool)
    fields = dict(completions=['x'], num_generations=1, direction='mask_to_caption')
    with pytest.raises(ValueError, match='1 predicted masks for 2 frames'):
        RolloutBatch(**fields, gt_tracks=[[mask, mask]], pred_tracks=[[mask]])
    with pytest.raises(ValueError, match='come together'):
        RolloutBatch(**fields, gt_tracks=[[mask]])
