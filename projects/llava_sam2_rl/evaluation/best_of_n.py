"""The best of n samples: how much there is left to learn, and whether the reward would find it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from projects.llava_sam2_rl.evaluation.tasks import TaskMetric
from projects.llava_sam2_rl.registry import METRICS

#: What the IoU of a direction's rollouts is called, as in `CycleMetric`.
NAMES = {'mask_to_caption': 'return_iou', 'caption_to_mask': 'own_iou'}


@METRICS.register_module()
class BestOfNMetric(TaskMetric):
    """IoU of the n rollouts of each held-out region, drawn and scored as in GRPO's training.

    In mask_to_caption n captions are sampled and segmented by the teacher (``return_iou``), in
    caption_to_mask n ``[SEG]`` actions (``own_iou``). Of each, over the regions:

    - ``…_mean``: mean of the n.
    - ``…_best``: the best of the n. What lies between it and the mean could be learnt from a reward
      that ranks by IoU; where there is nothing between, nothing can.
    - ``…_picked``: the one with the highest reward. Near the mean, the reward is blind; near the
      best, it is as good as the IoU. Regions none of whose rollouts was scored are left out.
    - ``…_zero_std``: share of regions whose rewards are all equal.

    n is the objective's ``num_generations``, the reward each direction's own. The draws are the
    same in every evaluation with the same batches.
    """

    default_prefix = 'best_of_n'
    task = 'rollouts'

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Scores one batch.

        Args:
            data_batch: Not used.
            data_samples: What the task `rollouts` returned.
        """
        for sample in data_samples:
            row: dict[str, float] = {}
            for direction, found in sample.items():
                row |= best_of(NAMES[direction], found['iou'], found['reward'])
            self.results.append(row)

    def compute_metrics(self, results: list[dict[str, float]]) -> dict[str, float]:
        """Means over the regions that have the number, and ``n``."""
        keys = list(dict.fromkeys(key for row in results for key in row))
        columns = {key: [row[key] for row in results if key in row] for key in keys}
        counts = columns.pop('n', [])
        numbers = {key: float(np.mean(values)) for key, values in columns.items()}
        return {**numbers, 'n': int(max(counts, default=0))}


def best_of(name: str, ious: Sequence[float], rewards: Sequence[float]) -> dict[str, float]:
    """The numbers of one region.

    Args:
        name: What the IoU is called.
        ious: n numbers.
        rewards: n numbers, NaN = unscorable. Of equal rewards the first is picked.
    """
    row = {'n': float(len(ious)), f'{name}_mean': float(np.mean(ious)), f'{name}_best': max(ious)}
    scored = [n for n, reward in enumerate(rewards) if not math.isnan(reward)]
    if scored:
        row[f'{name}_picked'] = ious[max(scored, key=lambda n: rewards[n])]
        row[f'{name}_zero_std'] = float(len({rewards[n] for n in scored}) == 1)
    return row
