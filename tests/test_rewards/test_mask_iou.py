import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from projects.llava_sam2_rl.rewards.mask_iou import (
    intersection_and_union,
    iou_from_counts,
    mask_iou,
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
