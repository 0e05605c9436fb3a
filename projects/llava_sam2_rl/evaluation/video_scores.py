"""Scores of a mask in one frame of a clip: J and F of DAVIS, A and R of ReVOS.

J and F: Perazzi et al. 2016, "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation". A and R: Yan et al. 2024, "VISA: Reasoning Video Object Segmentation via Large
Language Models", R after Li et al. 2022, "R2VOS". All masks are ``(H, W)`` bool of one size, all
scores lie in [0, 1].
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch

from projects.llava_sam2_rl.rewards.mask_iou import iou_from_counts

#: How far a boundary may lie from the true one, in diagonals of the frame.
BOUNDARY_TOLERANCE = 0.008


def region_similarity(pred: np.ndarray, gt: np.ndarray) -> float:
    """J: intersection over union; 1 where both masks are empty.

    Raises:
        ValueError: The masks differ in size.
    """
    _check_sizes(pred, gt)
    counts = (np.count_nonzero(pred & gt), np.count_nonzero(pred | gt))
    return float(iou_from_counts(*(torch.tensor(count) for count in counts)))


def boundary_measure(pred: np.ndarray, gt: np.ndarray) -> float:
    """F: harmonic mean of precision and recall of the boundary.

    A boundary pixel is matched where the other boundary is at most ``ceil(0.008 d)`` pixels away,
    d being the frame's diagonal. Where no mask has a boundary (it is empty, or all of the frame) F
    is 1, where one of them has none, 0.

    Raises:
        ValueError: The masks differ in size.
    """
    _check_sizes(pred, gt)
    found, true = boundary(pred), boundary(gt)
    num_found, num_true = np.count_nonzero(found), np.count_nonzero(true)
    if not num_found or not num_true:
        return float(num_found == num_true)
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*pred.shape))
    # Nothing is looked up outside of the box around both.
    left, top, width, height = cv2.boundingRect((found | true).astype(np.uint8))
    box = np.s_[top : top + height, left : left + width]
    found, true = found[box], true[box]
    precision = np.count_nonzero(found & _dilated(true, radius)) / num_found
    recall = np.count_nonzero(true & _dilated(found, radius)) / num_true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """``(H, W)`` bool: pixels that differ from their right, lower or lower right neighbour."""
    edge = np.zeros_like(mask, dtype=bool)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def pixel_accuracy(pred: np.ndarray, gt: np.ndarray) -> float:
    """A: share of the pixels that are alike.

    Raises:
        ValueError: The masks differ in size.
    """
    _check_sizes(pred, gt)
    return float((pred == gt).mean())


def robustness(pred: np.ndarray, gt: np.ndarray, foreground: np.ndarray) -> float:
    """R: one minus the false pixels for each pixel of the clip's annotated objects, at least 0.

    Args:
        pred: What was found.
        gt: What was to be found.
        foreground: All objects of the clip that some expression speaks of.

    Raises:
        ValueError: The masks differ in size.
    """
    _check_sizes(pred, gt)
    _check_sizes(pred, foreground)
    false = np.count_nonzero(pred & ~gt)
    # As officially: a false pixel where there is no foreground at all is as bad as can be.
    return max(1 - false / (np.count_nonzero(foreground) + 1e-6), 0.0)


def _dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    steps = np.arange(-radius, radius + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.uint8)
    return cv2.dilate(mask.astype(np.uint8), disk).astype(bool)


def _check_sizes(pred: np.ndarray, gt: np.ndarray) -> None:
    if pred.shape != gt.shape:
        raise ValueError(f'the masks are {pred.shape} and {gt.shape}: sizes must agree')
