"""Referring segmentation: how well the mask of a described object is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from projects.llava_sam2_rl.evaluation.per_sample_rows import RowMetric
from projects.llava_sam2_rl.registry import METRICS
from projects.llava_sam2_rl.rewards.mask_iou import intersection_and_union, iou_from_counts

#: Tenths of IoU that a mask has to reach for P@0.5 … P@0.9.
PRECISIONS = (5, 6, 7, 8, 9)


@METRICS.register_module()
class ReferringSegmentationMetric(RowMetric):
    """cIoU, gIoU and P@0.5 … P@0.9, source by source; the model answers freely.

    - ``ciou``: sum of intersections over sum of unions.
    - ``giou``: mean of the samples' IoU. Where mask and truth are both empty it is 1, where one of
      them is, 0; an answer without ``[SEG]`` is an empty mask.
    - ``p@0.5`` …: share of samples whose IoU is at least that.
    - ``no_seg``: number of answers without ``[SEG]``. Masks of several are joined.
    - ``no_text``: number of samples without a text to ask by; they are in no other number.

    So does the official evaluation of Sa2VA. Where some texts describe nothing in their image
    (gRefCOCO) there are also, by Liu et al., "GRES: Generalized Referring Expression
    Segmentation", 2023, with an empty mask as the model's "nothing":

    - ``n_acc``: share of the texts without an object whose mask is empty.
    - ``t_acc``: share of the texts with an object whose mask is not.
    - ``num_no_target``: number of texts without an object.
    """

    default_prefix = 'referring'
    task = 'referring'

    def row(self, meta: Any, prediction: Any) -> dict[str, Any]:
        """Pixel counts of one answer (``answer``, ``gt_mask``)."""
        answer = prediction['answer']
        intersection, union = intersection_and_union(answer.mask, prediction['gt_mask'])
        return {
            'text': meta.caption,
            'answer': answer.text,
            'num_seg': answer.num_seg,
            'no_target': not bool(prediction['gt_mask'].any()),
            'found_nothing': not bool(answer.mask.any()),
            'intersection': int(intersection),
            'union': int(union),
            'iou': float(iou_from_counts(intersection, union)),
        }

    def summarise(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """``{source}/{number}``."""
        numbers: dict[str, float] = {}
        for source, own in self.by_source(rows).items():
            asked = [row for row in own if row['text']]
            found: dict[str, float] = {}
            if asked:
                found = segmentation_scores(
                    [row['intersection'] for row in asked], [row['union'] for row in asked]
                )
                found |= no_target_scores(
                    [row['no_target'] for row in asked], [row['found_nothing'] for row in asked]
                )
            found['no_seg'] = sum(row['num_seg'] == 0 for row in asked)
            found['no_text'] = len(own) - len(asked)
            found['num_samples'] = len(asked)
            numbers.update({f'{source}/{key}': value for key, value in found.items()})
        return numbers


def no_target_scores(no_target: list[bool], found_nothing: list[bool]) -> dict[str, float]:
    """``n_acc``, ``t_acc``, ``num_no_target`` of N texts; see the metric.

    Args:
        no_target: N: whether nothing in the image is described.
        found_nothing: N: whether the predicted mask is empty.

    Returns:
        Nothing where every text has an object; ``t_acc`` only where one has.
    """
    none, silent = np.array(no_target, bool), np.array(found_nothing, bool)
    if not none.any():
        return {}
    scores = {'num_no_target': int(none.sum()), 'n_acc': float(silent[none].mean())}
    if not none.all():
        scores['t_acc'] = float((~silent[~none]).mean())
    return scores


def segmentation_scores(intersections: list[int], unions: list[int]) -> dict[str, float]:
    """``ciou``, ``giou``, ``p@0.5`` … of N samples' pixel counts; see the metric."""
    inter, union = np.array(intersections, np.int64), np.array(unions, np.int64)
    iou = iou_from_counts(torch.from_numpy(inter), torch.from_numpy(union)).double()
    total = iou_from_counts(torch.tensor(inter.sum()), torch.tensor(union.sum()))
    scores = {'ciou': float(total), 'giou': float(iou.mean())}
    for tenths in PRECISIONS:
        # In whole numbers: an IoU of exactly 0.7 is not below it.
        scores[f'p@0.{tenths}'] = float((10 * inter >= tenths * union).mean())
    return scores
