"""Intersection over union of masks: the one place that divides the one by the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards.base import RolloutBatch
from projects.llava_sam2_rl.utils.devices import to_host


def mask_iou(pred: Tensor | np.ndarray, gt: Tensor | np.ndarray) -> Tensor:
    """IoU of each pair of masks. Two empty masks score 1, one empty mask scores 0.

    Args:
        pred: ``(N, H, W)``, or ``(H, W)`` for one mask; bool, or numbers 0 and 1.
        gt: As ``pred``, of the same shape.

    Returns:
        ``(N,)`` float32 in [0, 1], on the device of ``pred``; ``(1,)`` for one mask.

    Raises:
        ValueError: The shapes differ or a value is neither 0 nor 1.
    """
    return iou_from_counts(*intersection_and_union(pred, gt))


def intersection_and_union(
    pred: Tensor | np.ndarray, gt: Tensor | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Pixels in both and pixels in either mask, for sums over a data set (cIoU).

    Args, errors: As :func:`mask_iou`.

    Returns:
        Two ``(N,)`` int64 tensors.
    """
    pred, gt = _as_bool(pred, 'pred'), _as_bool(gt, 'gt')
    if pred.shape != gt.shape:
        raise ValueError(f'pred is {tuple(pred.shape)} but gt is {tuple(gt.shape)}')
    gt = gt.to(pred.device)
    return (pred & gt).sum(dim=(1, 2)), (pred | gt).sum(dim=(1, 2))


def iou_from_counts(intersection: Tensor, union: Tensor) -> Tensor:
    """Pixel counts of any shape -> float32 IoU; an empty union means both masks are empty: 1."""
    iou = intersection.double() / union.clamp(min=1)
    return torch.where(union == 0, torch.ones_like(iou), iou).float()


def iou_matrix(pred: Tensor | np.ndarray, gt: Tensor | np.ndarray) -> Tensor:
    """IoU of every mask of one set with every mask of another; conventions of :func:`mask_iou`.

    Args:
        pred: ``(P, H, W)`` bool, or numbers 0 and 1; P may be 0.
        gt: ``(R, H, W)``, likewise.

    Returns:
        ``(P, R)`` float32 in [0, 1], on the device of ``pred``.

    Raises:
        ValueError: The masks differ in size or a value is neither 0 nor 1.
    """
    pred, gt = _as_bool(pred, 'pred'), _as_bool(gt, 'gt')
    if pred.shape[1:] != gt.shape[1:]:
        raise ValueError(
            f'pred is {tuple(pred.shape)} but gt is {tuple(gt.shape)}: the sizes must agree'
        )
    # Whole numbers below 2^53: exact.
    first, second = pred.flatten(1).double(), gt.to(pred.device).flatten(1).double()
    intersection = first @ second.T
    union = first.sum(1)[:, None] + second.sum(1)[None] - intersection
    return iou_from_counts(intersection, union)


def matched_iou(pred: Tensor | np.ndarray, gt: Tensor | np.ndarray) -> float:
    """How well a set of masks finds another, whatever their order; see :func:`matched_ious`."""
    return matched_ious([pred], [gt])[0]


def matched_ious(
    preds: Sequence[Tensor | np.ndarray], gts: Sequence[Tensor | np.ndarray]
) -> list[float]:
    """How well each of N sets of masks finds another, whatever the order of its masks.

    The masks are paired one to one such that the sum of their IoU is largest (Kuhn, "The Hungarian
    method for the assignment problem", 1955), and the IoU is averaged over the pairs. A mask that
    is left without a partner, because the sets differ in number, is a pair of IoU 0; where it is
    empty it says nothing and does not count. Two sets that hold no pixel score 1: nothing was to
    be found, and nothing was. One mask each is :func:`mask_iou`.

    Args:
        preds: N × ``(P, H, W)`` bool, or numbers 0 and 1; P may be 0.
        gts: N × ``(R, H, W)``, likewise.

    Returns:
        N numbers in [0, 1].

    Raises:
        ValueError: As of :func:`iou_matrix`.
    """
    pairs = [
        (_as_bool(pred, 'pred'), _as_bool(gt, 'gt')) for pred, gt in zip(preds, gts, strict=True)
    ]
    matrices = [iou_matrix(pred, gt) for pred, gt in pairs]
    # Whether each mask has a pixel, as numbers: all go to the host in one copy.
    filled = [
        torch.cat([masks.flatten(1).any(1).to(matrix) for masks in pair])
        for pair, matrix in zip(pairs, matrices, strict=True)
    ]
    values = to_host([*matrices, *filled])
    return [
        _matched(ious.numpy(), has_pixel.bool().tolist())
        for ious, has_pixel in zip(values[: len(pairs)], values[len(pairs) :], strict=True)
    ]


def track_ious(preds: Sequence[Sequence[Tensor]], gts: Sequence[Sequence[Tensor]]) -> list[float]:
    """Mean IoU over the frames of each of N clips, J of video object segmentation.

    As Perazzi et al. 2016 ("A Benchmark Dataset and Evaluation Methodology for Video Object
    Segmentation", DAVIS) define it: all frames count alike, one in which both masks are empty as 1.
    The masks of several regions are matched frame by frame, see :func:`matched_ious`.

    Args:
        preds: N × T × ``(P, H, W)`` bool; T may differ between clips.
        gts: N × T × ``(R, H, W)``, likewise.

    Returns:
        N numbers in [0, 1]; of a clip of one frame that of :func:`matched_iou`.
    """
    ious = iter(
        matched_ious([x for track in preds for x in track], [x for track in gts for x in track])
    )
    frames = [[next(ious) for _ in track] for track in preds]
    return [sum(track) / len(track) for track in frames]


def clip_iou(track: Sequence[Tensor], gt: Sequence[Tensor]) -> float:
    """J of one object in one clip, see :func:`track_ious`.

    Args:
        track: T × ``(H, W)`` bool.
        gt: Likewise.
    """
    return track_ious([[mask[None] for mask in track]], [[mask[None] for mask in gt]])[0]


def _matched(ious: np.ndarray, has_pixel: Sequence[bool]) -> float:
    """Of the IoU ``(P, R)`` of two sets and of P + R masks, whether they have a pixel."""
    rows, columns = linear_sum_assignment(ious, maximize=True)
    scores = ious[rows, columns].tolist()
    paired = {*rows.tolist(), *(len(ious) + columns).tolist()}
    scores += [0.0 for i, filled in enumerate(has_pixel) if filled and i not in paired]
    return sum(scores) / len(scores) if scores else 1.0


def _as_bool(mask: Tensor | np.ndarray, name: str) -> Tensor:
    tensor = torch.as_tensor(mask)
    if tensor.ndim not in (2, 3):
        raise ValueError(f'{name} must be (N, H, W) or (H, W), got shape {tuple(tensor.shape)}')
    if tensor.dtype != torch.bool:
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            raise ValueError(
                f'{name} must hold only 0 and 1, got values from {tensor.min().item()} to '
                f'{tensor.max().item()}; threshold it first'
            )
        tensor = tensor != 0
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


@REWARDS.register_module()
class MaskIoUReward:
    """IoU of the predicted with the true mask; of sets, the mean over matched masks.

    Where the target is empty (a caption that nothing in the image fits) an empty prediction scores
    1, any other 0. A caption that speaks of several regions has a set of masks: see
    :func:`matched_iou`. Where masks were carried through a clip it is the mean over the frames, see
    :func:`track_ious`; a frame in which both masks are empty counts 1.
    """

    name = 'mask_iou'
    needs = ()

    def __call__(self, rollouts: RolloutBatch) -> list[float | None]:
        """A number in [0, 1] per rollout; logits are cut at 0 (NaN is outside).

        Raises:
            ValueError: The batch holds no predicted or no true masks.
        """
        if rollouts.pred_mask_logits is None or rollouts.gt_masks is None:
            raise ValueError(
                'MaskIoUReward needs pred_mask_logits and gt_masks, the batch lacks '
                f'{"pred_mask_logits" if rollouts.pred_mask_logits is None else "gt_masks"}'
            )
        if rollouts.pred_tracks is not None and rollouts.gt_tracks is not None:
            return list(track_ious(rollouts.pred_tracks, rollouts.gt_tracks))
        return list(
            matched_ious([x.detach() > 0 for x in rollouts.pred_mask_logits], rollouts.gt_masks)
        )
