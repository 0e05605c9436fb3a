"""What a run logged, over all its restarts: scalars, rollouts, skipped records, phases."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Rollout files that are read; of more, as many at equal distances.
MAX_ROLLOUT_FILES = 200


@dataclass
class Scalars:
    """Logged values by step, ascending.

    Args:
        training: Step -> values of the training steps.
        validation: Step -> values of the validations.
        starts: How often the run was started.
        unreadable: Lines that are no JSON object, as a killed process leaves one.
    """

    training: dict[int, dict[str, float]] = field(default_factory=dict)
    validation: dict[int, dict[str, float]] = field(default_factory=dict)
    starts: int = 0
    unreadable: int = 0

    @property
    def last_step(self) -> int:
        """The latest step with a value."""
        return max([*self.training, *self.validation], default=0)

    def curve(self, key: str) -> list[tuple[int, float]]:
        """``(step, value)`` of a key, where it was logged."""
        rows = self.training if any(key in row for row in self.training.values()) else None
        rows = self.validation if rows is None else rows
        return [(step, row[key]) for step, row in rows.items() if key in row]

    def keys(self) -> list[str]:
        """Every key that was logged in training, in order of appearance."""
        return list(dict.fromkeys(key for row in self.training.values() for key in row))


def read_scalars(work_dir: Path) -> Scalars:
    """Merges ``<work_dir>/<start>/vis_data/scalars.json`` of all starts.

    A start replaces what earlier ones logged from its first training step on: they went on with
    weights that it does not have. (A validation that it makes up for replaces the earlier one.)
    """
    merged = Scalars()
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        rows, unreadable = read_lines(file)
        merged.unreadable += unreadable
        rows = [row for row in rows if isinstance(row.get('step'), int)]
        if not rows:
            continue
        merged.starts += 1
        # mmengine logs `iter` of training steps alone.
        training = {row['step']: _numbers(row) for row in rows if 'iter' in row}
        validation = {row['step']: _numbers(row) for row in rows if 'iter' not in row}
        first = min(training, default=math.inf)
        merged.training = {s: row for s, row in merged.training.items() if s < first} | training
        merged.validation = {
            s: row for s, row in merged.validation.items() if s < first
        } | validation
    merged.training = dict(sorted(merged.training.items()))
    merged.validation = dict(sorted(merged.validation.items()))
    return merged


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ('step', 'iter', 'epoch')
    }


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a ``.jsonl`` file, and how many lines are none."""
    rows, unreadable = [], 0
    # Not `splitlines`, which splits at characters that JSON may hold.
    for line in file.read_text(encoding='utf-8', errors='replace').split('\n'):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            unreadable += 1
    return rows, unreadable


@dataclass(frozen=True)
class RewardPart:
    """Mean of one reward of one source.

    Args:
        direction: ``'mask_to_caption' | 'caption_to_mask'``.
        source: Data source, ``'?'`` where the sample has no name.
        name: Of the reward function, or ``'reward'`` for their weighted sum.
        early: Mean over the first half of the recorded steps, ``None`` where there is none.
        late: Over the second half; with an odd number of steps it has one more.
        scored: Completions with a value.
        unscored: Completions for which the reward declined.
    """

    direction: str
    source: str
    name: str
    early: float | None
    late: float | None
    scored: int
    unscored: int


@dataclass(frozen=True)
class RewardParts:
    """Rewards of the recorded rollouts.

    Args:
        parts: By direction, source and function.
        steps: Recorded steps that were read.
        left_out: Recorded steps that were not.
        unreadable: Lines that are no JSON object.
    """

    parts: list[RewardPart]
    steps: list[int]
    left_out: int
    unreadable: int


def read_reward_parts(work_dir: Path, last_step: int | None = None) -> RewardParts:
    """Reward parts by source, from ``<work_dir>/rollouts/iter_*.jsonl``.

    Args:
        work_dir: Of the run.
        last_step: Later files are of an earlier start, which went further.
    """
    files = {int(file.stem.split('_')[1]): file for file in work_dir.glob('rollouts/iter_*.jsonl')}
    steps = [step for step in sorted(files) if last_step is None or step <= last_step]
    shown = evenly(steps, MAX_ROLLOUT_FILES)
    late = set(shown[len(shown) // 2 :])
    unreadable = 0
    values: dict[tuple[str, str, str], dict[bool, list[float]]] = {}
    declined: Counter[tuple[str, str, str]] = Counter()
    for step in shown:
        rows, wrong = read_lines(files[step])
        unreadable += wrong
        for row in rows:
            source = str(row.get('sample') or '?').split('/')[0]
            parts = {'reward': row.get('reward'), **row.get('rewards', {})}
            if len(parts) == 2:  # a sum of one
                del parts['reward']
            for name, value in parts.items():
                key = (str(row.get('direction')), source, name)
                halves = values.setdefault(key, {False: [], True: []})
                if value is None:
                    declined[key] += 1
                else:
                    halves[step in late].append(float(value))
    found = [
        RewardPart(
            *key,
            early=mean(halves[False]),
            late=mean(halves[True]),
            scored=len(halves[False]) + len(halves[True]),
            unscored=declined[key],
        )
        for key, halves in sorted(values.items(), key=lambda item: _order(item[0]))
    ]
    return RewardParts(found, shown, len(steps) - len(shown), unreadable)


def _order(key: tuple[str, str, str]) -> tuple[bool, str, bool, str]:
    direction, source, name = key
    return direction != 'mask_to_caption', source, name != 'reward', name


def evenly(values: list[int], count: int) -> list[int]:
    """At most ``count`` of the values at equal distances, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def mean(values: Iterable[float]) -> float | None:
    """Mean of the finite values; ``None`` without any."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


@dataclass
class Progress:
    """What `ReportHook` counted, over all starts.

    Args:
        read: Records read, by source.
        bad: Records that could not be used, by source and reason.
        seconds: By phase, of the main process.
        host_memory: Peak of the main process in bytes.
        known: Whether anything was recorded.
    """

    read: Counter[str] = field(default_factory=Counter)
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    host_memory: int = 0
    known: bool = False


def read_progress(work_dir: Path) -> Progress:
    """Sums up ``<work_dir>/report/progress.jsonl``, a line per checkpoint and validation.

    Of each start counts what it did up to where a later one went on.
    """
    file = work_dir / 'report/progress.jsonl'
    total = Progress()
    if not file.is_file():
        return total
    starts: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(file)[0]:
        starts.setdefault(line['start'], []).append(line)
    names = list(starts)
    for i, name in enumerate(names):
        end = min((starts[later][0]['from'] for later in names[i + 1 :]), default=math.inf)
        lines = [line for line in starts[name] if line['iter'] <= end]
        if not lines or (end == 0 and i < len(names) - 1):
            continue
        latest = lines[-1]
        total.known = True
        total.read.update(latest['read'])
        for source, reason, count in latest['bad']:
            total.bad[source, reason] += count
        for phase, seconds in latest['seconds'].items():
            total.seconds[phase] += seconds
        total.host_memory = max(total.host_memory, latest['host_memory'])
    return total
