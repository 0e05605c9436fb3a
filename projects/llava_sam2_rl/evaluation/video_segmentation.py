"""Video object segmentation by expressions: how well the masks of a clip are found."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.evaluation.per_sample_rows import RowMetric
from projects.llava_sam2_rl.evaluation.video_scores import (
    boundary_measure,
    pixel_accuracy,
    region_similarity,
    robustness,
)
from projects.llava_sam2_rl.inference.video import VideoSegmentation
from projects.llava_sam2_rl.inference.video_files import write_masks
from projects.llava_sam2_rl.prompts import SEG
from projects.llava_sam2_rl.registry import METRICS
from projects.llava_sam2_rl.structures import ClipSample, RunLengths

#: Folder of what is handed in, below the work directory.
SUBMISSION = 'submission'


@METRICS.register_module()
class VideoObjectSegmentationMetric(RowMetric):
    """J, F and J&F of expressions in clips, source by source; the model answers freely.

    - ``j``: region similarity, the IoU of a frame's masks; ``f``: boundary measure, with DAVIS's
      tolerance of 0.008 diagonals. Each is the mean over all frames of an expression, then over the
      expressions. ``j&f``: their mean.
    - ``accuracy``, ``robustness`` (ReVOS's A and R), where the source has the masks of all objects.
    - ``no_seg``: number of answers without ``[SEG]``: empty masks. Of several ``[SEG]`` the first
      counts.
    - ``num_samples``: number of expressions.

    Where expressions are of several kinds (ReVOS's ``referring`` and ``reasoning``, Ref-SAV's
    ``long`` and ``short``) all this is given for each, and ``overall``: the mean of the kinds. So
    does the official evaluation of Sa2VA.

    Args:
        submission: Writes the masks as PNG files, 0 and 255, for a benchmark that keeps its own to
            itself: ``submission/{source}/Annotations/{video}/{expression}/{frame}.png`` in the work
            directory. Defaults to False.
        **kwargs: See `RowMetric`.
    """

    default_prefix = 'video'
    task = 'video'

    def __init__(self, submission: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.submission = submission

    def row(self, meta: ClipSample, prediction: VideoSegmentation | BadRecord) -> dict[str, Any]:
        """Scores one expression, frame by frame."""
        if isinstance(prediction, BadRecord):
            raise prediction
        row: dict[str, Any] = {
            'group': meta.group,
            'text': meta.caption,
            'answer': prediction.answer,
            'num_seg': prediction.answer.count(SEG),
            'num_frames': len(prediction),
        }
        if self.submission:
            folder = self._submission(meta.source) / meta.video / meta.expression
            write_masks(prediction, folder, [path.stem for path in meta.frames])
        return row | clip_scores(prediction, meta)

    def summarise(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """``{source}/{number}``, or ``{source}/{group}/{number}``."""
        numbers: dict[str, float] = {}
        for source, own in self.by_source(rows).items():
            numbers |= {f'{source}/{key}': value for key, value in group_scores(own).items()}
            if self.submission:
                where = self._submission(source)
                print_log(f'{source}: the masks to hand in are in {where}', logger='current')
            elif not any('j' in row for row in own):
                print_log(
                    f'{source} has no masks to compare with, so there is no score: hand in the '
                    "masks that the metric writes with submission=True to the benchmark's server",
                    logger='current',
                    level=logging.WARNING,
                )
        return numbers

    def _submission(self, source: str) -> Path:
        return (self.work_dir or Path('.')) / SUBMISSION / source / 'Annotations'


def clip_scores(found: VideoSegmentation, sample: ClipSample) -> dict[str, float]:
    """Means of one expression's scores over the frames; nothing where it has no masks.

    Masks are decoded frame by frame.
    """
    if sample.masks is None:
        return {}
    scores: dict[str, list[float]] = {}
    for number, rle in enumerate(sample.masks):
        gt, pred = _decoded(rle, sample), found.mask(number)
        one = {'j': region_similarity(pred, gt), 'f': boundary_measure(pred, gt)}
        if sample.foreground is not None:
            one['accuracy'] = pixel_accuracy(pred, gt)
            one['robustness'] = robustness(pred, gt, _decoded(sample.foreground[number], sample))
        for key, value in one.items():
            scores.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in scores.items()}


def group_scores(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers of one source; see the metric."""
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row['group'], []).append(row)
    by_group = {group: _means(own) for group, own in sorted(groups.items(), key=str)}
    if list(by_group) == [None]:
        return by_group[None]
    if len(by_group) > 1:
        kinds = list(by_group.values())
        counts = ('no_seg', 'num_samples')
        by_group['overall'] = {
            key: sum(kind[key] for kind in kinds) / (1 if key in counts else len(kinds))
            for key in kinds[0]
        }
    return {
        f'{group}/{key}': value for group, own in by_group.items() for key, value in own.items()
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    scored = [row for row in rows if 'j' in row]
    means: dict[str, float] = {}
    if scored:
        j, f = (float(np.mean([row[key] for row in scored])) for key in ('j', 'f'))
        means = {'j&f': (j + f) / 2, 'j': j, 'f': f}
        for key in ('accuracy', 'robustness'):
            if key in scored[0]:
                means[key] = float(np.mean([row[key] for row in scored]))
    means['no_seg'] = sum(row['num_seg'] == 0 for row in rows)
    means['num_samples'] = len(rows)
    return means


def _decoded(rle: RunLengths | None, sample: ClipSample) -> np.ndarray:
    if rle is None:
        return np.zeros((sample.height, sample.width), dtype=bool)
    return coco_mask.decode(rle).astype(bool)
