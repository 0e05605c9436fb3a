"""What the metrics of this package share: one row per sample, no sample counted twice."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmengine.logging import print_log

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.evaluation.tasks import TaskMetric


class RowMetric(TaskMetric):
    """A metric whose results are rows, one dict per sample, kept for whoever reads them later.

    Over several ranks mmengine puts the rows into the order of the data set and drops what a
    sampler repeats at the end to give all ranks the same number. A bad record is replaced by
    another one of its source; here it is left out instead, and said.

    Args:
        **kwargs: See `TaskMetric`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        #: ``(source, sample_id, reason)`` of the bad records of the last evaluation.
        self.skipped: list[tuple[str, str, str]] = []

    def row(self, meta: Any, prediction: Any) -> dict[str, Any]:
        """Scores one sample.

        Raises:
            BadRecord: It cannot be used, which shows only now; it is left out.
        """
        raise NotImplementedError

    def summarise(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """The numbers of all rows."""
        raise NotImplementedError

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Scores one batch.

        Args:
            data_batch: What `sa2va_collate` made.
            data_samples: B predictions for this metric's task.
        """
        skipped = list(data_batch['data'].get('skipped', ()))
        rows = []
        for meta, prediction in zip(data_batch['data_samples'], data_samples, strict=True):
            row = {'source': meta.source, 'sample_id': meta.sample_id}
            try:
                row |= self.row(meta, prediction)
            except BadRecord as error:
                skipped.append((meta.source, meta.sample_id, error.reason))
                # It keeps its place: rows of several ranks are put in order by their number.
                row['left_out'] = True
            rows.append(row)
        rows[0]['skipped'] = skipped
        self.results += rows

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Numbers over the samples, each once."""
        skipped = {tuple(record) for row in results for record in row.pop('skipped', ())}
        # A stand-in for a bad record has its own place in the data set, too.
        rows = {(row['source'], row['sample_id']): row for row in results if 'left_out' not in row}
        self.rows = list(rows.values())
        self.skipped = sorted(skipped)
        if skipped:
            reasons = Counter(reason for *_, reason in skipped).most_common()
            print_log(
                f'{type(self).__name__}: {len(skipped)} records cannot be used and are left out ('
                + ', '.join(f'{count} x {reason}' for reason, count in reasons)
                + f'), the first is {"/".join(self.skipped[0][:2])}',
                logger='current',
                level=logging.WARNING,
            )
        if not self.rows:
            print_log(f'{type(self).__name__}: no sample', logger='current', level=logging.WARNING)
            return {}
        return self.summarise(self.rows)

    @staticmethod
    def by_source(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """The rows of each source, in order."""
        sources: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            sources.setdefault(row['source'], []).append(row)
        return sources
