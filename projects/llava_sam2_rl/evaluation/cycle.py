"""The cycle as a metric: how well a region comes back from its own description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from projects.llava_sam2_rl.datasets.collate import sa2va_collate
from projects.llava_sam2_rl.evaluation.attributes import compare_attributes
from projects.llava_sam2_rl.evaluation.tasks import TaskMetric
from projects.llava_sam2_rl.models.dual_loop import DualLoopModel
from projects.llava_sam2_rl.registry import METRICS
from projects.llava_sam2_rl.rewards.mask_iou import clip_iou, mask_iou
from projects.llava_sam2_rl.rewards.meteor import meteor


@METRICS.register_module()
class CycleMetric(TaskMetric):
    """Held-out numbers of `DualLoopModel.predict`.

    - ``return_iou``: IoU of mask and mask′ (mask -> greedy caption -> mask′).
    - ``meteor``: METEOR of the greedy caption against the reference caption.
    - ``caption_reward``: METEOR of caption and caption′ (caption -> mask′ -> greedy caption′).
    - ``own_iou``: IoU of the mask found for the region's own reference caption.
    - ``other_iou``: IoU with the region of the mask found for another region's caption.
    - ``listening_gap``: ``own_iou − other_iou`` over regions that have both; a deaf segmenter
      scores 0.
    - ``attribute_recall``, of records with attributes (generated ones): share of the object's
      attributes that the greedy caption names rightly; ``wrong_attributes``: how many values it
      names that are not the object's, a mean over captions. Both again for each attribute:
      ``attribute_recall_colour``, ….

    - ``return_j``, ``own_j``, of clips of more than two frames: mean over the frames of the IoU of
      the clip's mask and the one that is found on the first frame, for the greedy or the reference
      caption, and carried on by SAM 2's memory (J, see `clip_iou`).

    Numbers whose texts the data does not have are left out.
    """

    default_prefix = 'cycle'
    task = 'cycle'

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Scores one batch.

        Args:
            data_batch: Not used.
            data_samples: What `DualLoopModel.predict` returned.
        """
        for sample in data_samples:
            masks = sample['masks']
            row = {'return_iou': _iou(masks['generated'], sample['target_mask'])}
            if sample['reference']:
                row['meteor'] = meteor(sample['reference'], sample['caption'])
            if sample['caption_return'] is not None:
                row['caption_reward'] = meteor(sample['reference'], sample['caption_return'])
            if 'reference' in masks:
                row['own_iou'] = _iou(masks['reference'], sample['gt_mask'])
            if 'distractor' in masks:
                row['other_iou'] = _iou(masks['distractor'], sample['gt_mask'])
            if 'reference' in masks and 'distractor' in masks:
                row['listening_gap'] = row['own_iou'] - row['other_iou']
            tracks = sample['tracks']
            for key, what in (('return_j', 'generated'), ('own_j', 'reference')):
                if what in tracks:
                    row[key] = clip_iou(tracks[what], tracks['gt'])
            if sample['attributes']:
                row |= _attribute_row(sample['caption'], sample['attributes'])
            self.results.append(row)

    def compute_metrics(self, results: list[dict[str, float]]) -> dict[str, float]:
        """Means over the samples that have the number."""
        keys: tuple[str, ...] = (
            'return_iou',
            'meteor',
            'caption_reward',
            'own_iou',
            'other_iou',
            'listening_gap',
            'return_j',
            'own_j',
            'attribute_recall',
            'wrong_attributes',
        )
        by_attribute = {key: None for row in results for key in row if key not in keys}
        keys += tuple(sorted(by_attribute))
        columns = {key: [row[key] for row in results if key in row] for key in keys}
        return {key: float(np.mean(values)) for key, values in columns.items() if values}


def _attribute_row(caption: str, attributes: Mapping[str, str]) -> dict[str, float]:
    named = compare_attributes(caption, attributes)
    row: dict[str, float] = {
        'attribute_recall': sum(x.right for x in named.values()) / len(named),
        'wrong_attributes': sum(x.num_wrong for x in named.values()),
    }
    for key, found in named.items():
        row[f'attribute_recall_{key}'] = float(found.right)
        row[f'wrong_attributes_{key}'] = found.num_wrong
    return row


def _iou(pred: Any, gt: Any) -> float:
    return float(mask_iou(pred[None], gt[None])[0])


def evaluate_cycle(
    model: DualLoopModel, dataset: Dataset, batch_size: int = 32, progress: str | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metric on a whole data set, outside a runner.

    Args:
        model: The model.
        dataset: Items for `sa2va_collate`.
        batch_size: Samples at once. Defaults to 32.
        progress: Title of a progress bar. Defaults to ``None``: no bar.

    Returns:
        The numbers, and what `DualLoopModel.predict` gave for every sample.
    """
    model.eval()
    metric = CycleMetric(prefix='')
    loader = DataLoader(dataset, batch_size, collate_fn=sa2va_collate)
    results: list[dict[str, Any]] = []
    for batch in tqdm(loader, desc=progress, disable=progress is None):
        predictions = model.predict(**model.data_preprocessor(batch, False))
        metric.process(batch, predictions)
        results += predictions
    return metric.compute_metrics(metric.results), results
