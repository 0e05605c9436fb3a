"""Counting the records that could not be used or were changed; stopping at too many bad ones."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log

from projects.llava_sam2_rl.registry import HOOKS


@HOOKS.register_module()
class BadRecordHook(Hook):
    """Counts bad records by source and reason in the training process.

    Warns once per source and reason, logs the table at the end of each epoch and of the training,
    and stops a run whose source is mostly unusable. Each rank watches what it reads itself; the
    table adds up all ranks. What was taken out of texts or cut off them
    (``RegionDataset.max_caption_tokens``, `prompts.MARKUP`) is counted and told in the same way, by
    source and kind.

    A source stops the run when more than ``max_bad_fraction`` of its first ``window`` records (or
    of all, where the training ends earlier) are bad. It does so before the window is full when
    the share exceeds the bound by more than chance explains: three standard deviations of the
    binomial distribution.

    Args:
        max_bad_fraction: Largest share of bad records among those read from a source, between 0
            and 1. Defaults to 0.2.
        window: Number of records of a source that are watched; what goes bad later is only
            counted. Defaults to 1000.
        min_records: Number of records of a source before its share is looked at, except at the
            end of the training. Defaults to 50.

    Raises:
        RuntimeError: A source has too many bad records; the message lists them.
    """

    _LISTED = 20

    def __init__(
        self, max_bad_fraction: float = 0.2, window: int = 1000, min_records: int = 50
    ) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f'max_bad_fraction must lie in [0, 1], got {max_bad_fraction}')
        if not 1 <= min_records <= window:
            raise ValueError(
                f'min_records must lie between 1 and window ({window}), got {min_records}'
            )
        self.max_bad_fraction = max_bad_fraction
        self.window = window
        self.min_records = min_records
        self.read: Counter[str] = Counter()
        self.bad: Counter[tuple[str, str]] = Counter()
        self._seen: list[tuple[str, str, str]] = []
        self._bad_in_window: Counter[str] = Counter()
        self._read_in_window: Counter[str] = Counter()
        self.changed: Counter[tuple[str, str]] = Counter()
        self._logged: tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]] | None = None

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Counts the records of a batch and checks the sources it touches."""
        if not isinstance(data_batch, dict):
            return
        self._count_changed(data_batch['data'].get('changed', ()))
        skipped = [tuple(record) for record in data_batch['data'].get('skipped', ())]
        for source, sample_id, reason in skipped:
            self.read[source] += 1
            if (source, reason) not in self.bad:
                print_log(
                    f'{source}: record {sample_id!r} cannot be used ({reason}), another one takes '
                    'its place; further ones of this kind are counted silently',
                    logger='current',
                    level=logging.WARNING,
                )
            self.bad[source, reason] += 1
            if self._read_in_window[source] < self.window:
                self._read_in_window[source] += 1
                self._bad_in_window[source] += 1
                self._seen.append((source, sample_id, reason))
        for meta in data_batch.get('data_samples', ()):
            self.read[meta.source] += 1
            if self._read_in_window[meta.source] < self.window:
                self._read_in_window[meta.source] += 1
        touched = {source for source, _, _ in skipped}
        touched.update(meta.source for meta in data_batch.get('data_samples', ()))
        for source in sorted(touched):
            self._check(source)

    def _count_changed(self, changed: Iterable[Sequence[str]]) -> None:
        for source, sample_id, kind in changed:
            if (source, kind) not in self.changed:
                print_log(
                    f'{source}: the text of record {sample_id!r} was changed ({kind}); further '
                    'changes of this kind are counted silently',
                    logger='current',
                    level=logging.WARNING,
                )
            self.changed[source, kind] += 1

    def after_train_epoch(self, runner: Any) -> None:
        """Logs the table."""
        self._log()

    def after_train(self, runner: Any) -> None:
        """Logs the table if it changed since, and checks sources that were read little."""
        self._log()
        for source in sorted(self._bad_in_window):
            self._check(source, final=True)

    def _allowed(self, read: int, final: bool) -> float:
        """Bad records that are tolerated among ``read``."""
        share = self.max_bad_fraction
        if read >= self.window or (final and read >= self.min_records):
            return share * read
        if read < self.min_records and not final:
            return math.inf
        return share * read + 3 * math.sqrt(share * (1 - share) * read)

    def _check(self, source: str, final: bool = False) -> None:
        read, bad = self._read_in_window[source], self._bad_in_window[source]
        if bad <= self._allowed(read, final):
            return
        records = [record for record in self._seen if record[0] == source]
        lines = [f'  {name}: {reason}' for _, name, reason in records[: self._LISTED]]
        if len(records) > self._LISTED:
            lines.append(f'  and {len(records) - self._LISTED} more')
        listed = '\n'.join(lines)
        raise RuntimeError(
            f'{source}: {bad} of the first {read} records cannot be used, more than '
            f'max_bad_fraction={self.max_bad_fraction} allows. Check the paths of this source, or '
            f'raise the bound:\n{listed}'
        )

    def _totals(
        self,
    ) -> tuple[Counter[str], Counter[tuple[str, str]], Counter[tuple[str, str]]]:
        """Records read, bad records and changes of texts, summed over all ranks."""
        read, bad, changed = Counter[str](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        for rank_read, rank_bad, rank_changed in all_gather_object(
            (self.read, self.bad, self.changed)
        ):
            read.update(rank_read)
            bad.update(rank_bad)
            changed.update(rank_changed)
        return read, bad, changed

    def _log(self) -> None:
        read, bad, changed = self._totals()
        if (bad, changed) == self._logged:
            return
        self._logged = bad, changed
        rows = [
            f'  {source}: {count} of {read[source]} ({count / read[source]:.1%}) {reason}'
            for (source, reason), count in sorted(bad.items())
        ]
        table = 'bad records:\n' + '\n'.join(rows) if rows else 'bad records: none'
        if changed:
            rows = [
                f'  {source}: {count} x {kind}' for (source, kind), count in sorted(changed.items())
            ]
            table += '\ntexts changed:\n' + '\n'.join(rows)
        if is_main_process():
            print_log(table, logger='current')
