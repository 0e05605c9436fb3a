"""What belongs together in an official batch, from hand-made ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from projects.llava_sam2_rl.models import ImageFeatures
from projects.llava_sam2_rl.models.sa2va.official_batch import (
    align_prompt_masks,
    gt_masks,
    left_padded,
    original_size,
    prompt_plan,
)


def numbered(*values: float) -> torch.Tensor:
    """A 2 x 2 mask for each value, filled with it."""
    return torch.tensor(values).view(-1, 1, 1).expand(-1, 2, 2)


def test_prompts_go_sample_by_sample_and_frame_by_frame():
    # Two [SEG] on two frames, none, one [SEG] on one frame.
    plan = prompt_plan({'frames_per_batch': [2, 1, 1]}, [2, 0, 1], 4)
    assert plan == ([0, 1, 0, 1, 2], [0, 0, 1, 1, 3])
    # Without the entry each sample has one frame.
    assert prompt_plan({}, [1, 2], 2) == ([0, 1, 2], [0, 1, 1])
    # Entries of samples with [SEG] only: the one without has no frame.
    assert prompt_plan({'frames_per_batch': [2, 1]}, [1, 0, 1], 3) == ([0, 0, 1], [0, 1, 2])


def test_frames_that_do_not_fit_are_named_with_both_numbers():
    with pytest.raises(ValueError, match='3 entries for 2 samples, 1 of them with'):
        prompt_plan({'frames_per_batch': [1, 1, 1]}, [1, 0], 3)
    with pytest.raises(ValueError, match='sums to 3, g_pixel_values 2'):
        prompt_plan({'frames_per_batch': [2, 1]}, [1, 1], 2)


def test_ground_truth_comes_in_the_order_of_the_predictions():
    # Given object by object (object.frame), predicted frame by frame.
    masks = [numbered(0.0, 0.1, 1.0, 1.1), None, numbered(2.0)]
    found = gt_masks({'masks': masks, 'frames_per_batch': [2, 1, 1]}, [2, 0, 1])
    assert [round(float(m.max()), 1) for m in found] == [0.0, 1.0, 0.1, 1.1, 2.0]
    listed_for_seg_only = gt_masks({'masks': masks, 'frames_per_batch': [2, 1]}, [2, 0, 1])
    assert all(torch.equal(a, b) for a, b in zip(found, listed_for_seg_only, strict=True))


def test_masks_that_do_not_fit_name_the_sample_and_both_numbers():
    with pytest.raises(ValueError, match='1 mask entries for 2 samples'):
        gt_masks({'masks': [None]}, [0, 0])
    with pytest.raises(ValueError, match=r"sample 'b/7': 1 \[SEG\] × 1 frames, but 2 ground-truth"):
        gt_masks({'masks': [None, numbered(0, 1)], 'sample_ids': ['a/0', 'b/7']}, [0, 1])
    with pytest.raises(ValueError, match='sample 0 of the batch: 2 .* but 0 ground-truth'):
        gt_masks({'masks': [None]}, [2])


def test_prompt_masks_go_to_the_images_with_regions():
    flags = torch.tensor([False, True, False, False, True])
    features = ImageFeatures(torch.zeros(5, 4, 8), (2, 1, 2), flags, None)
    first, last = numbered(1.0), numbered(2.0)
    aligned = align_prompt_masks({'prompt_masks': [first, last]}, features)
    assert aligned[0] is first
    assert aligned[1] is None
    assert aligned[2] is last
    per_sample = [first, None, last]
    assert align_prompt_masks({'prompt_masks': per_sample}, features) == per_sample
    assert align_prompt_masks({}, features) is None
    with pytest.raises(ValueError, match='1 prompt_masks for 2 images with regions'):
        align_prompt_masks({'prompt_masks': [first]}, features)


def test_padding_moves_to_the_left_and_the_order_stays():
    ids = torch.tensor([[5, 6, 7, 9, 9], [9, 1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    found_ids, found_mask = left_padded({'input_ids': ids, 'attention_mask': mask}, 0)
    assert found_ids.tolist() == [[0, 5, 6, 7], [1, 2, 3, 4]]
    assert found_mask.tolist() == [[False, True, True, True], [True] * 4]


def test_the_original_size_is_that_of_record_masks_or_grounding_image():
    masks = {'masks': [torch.zeros(1, 3, 4)]}
    record = SimpleNamespace(height=5, width=6)
    assert original_size(masks, [record], 0, 128) == (5, 6)
    assert original_size(masks, None, 0, 128) == (3, 4)
    assert original_size({}, None, 0, 128) == (128, 128)
