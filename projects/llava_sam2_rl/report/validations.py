"""What the model did with each held-out region, and which regions are worth showing."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from projects.llava_sam2_rl.report.logs import read_lines

FOLDER = 'validations'
#: Pictures of the regions; see `ReportHook`.
IMAGES = 'images.zip'
_PER_KIND = 2


@dataclass(frozen=True)
class Validation:
    """One validation.

    Args:
        step: Training steps before it.
        rows: As `ReportHook` documents them, by name of the region.
    """

    step: int
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A held-out region.

    Args:
        kind: Why it is shown.
        name: ``source/sample_id``.
        before: Row of the first validation, ``None`` where there was only one.
        after: Row of the latest.
    """

    kind: str
    name: str
    before: dict[str, Any] | None
    after: dict[str, Any]

    @property
    def change(self) -> float:
        """How much IoU of the way back was gained; 0 without a validation before."""
        return 0.0 if self.before is None else self.after['iou'] - self.before['iou']


def read_validations(
    work_dir: Path, last_step: int | None = None
) -> tuple[Validation | None, Validation | None]:
    """The first and the latest validation; the first is ``None`` where there is only one.

    Args:
        work_dir: Of the run.
        last_step: Later ones are of an earlier start, which went further.
    """
    files = {int(file.stem.split('_')[1]): file for file in work_dir.glob(f'{FOLDER}/iter_*.jsonl')}
    steps = [step for step in sorted(files) if last_step is None or step <= last_step]
    if not steps:
        return None, None
    read = [
        Validation(step, {row['name']: row for row in read_lines(files[step])[0]})
        for step in dict.fromkeys((steps[0], steps[-1]))
    ]
    return (None, read[0]) if len(read) == 1 else (read[0], read[1])


def choose(
    first: Validation | None, latest: Validation | None, per_kind: int = _PER_KIND
) -> list[Example]:
    """The best, the worst and the most changed regions that have a picture, each region once.

    The most changed come first, since a region that changed much is often also a best one.
    """
    if latest is None:
        return []
    drawn = {name: row for name, row in latest.rows.items() if 'found' in row}
    before = {} if first is None else {n: r for n, r in first.rows.items() if 'found' in r}
    both = [Example('', name, before[name], drawn[name]) for name in drawn if name in before]
    alone = [Example('', name, before.get(name), row) for name, row in drawn.items()]
    gained = sorted((e for e in both if e.change > 0), key=lambda e: (-e.change, e.name))
    lost = sorted((e for e in both if e.change < 0), key=lambda e: (e.change, e.name))
    best = sorted(alone, key=lambda e: (-e.after['iou'], e.name))
    worst = sorted(alone, key=lambda e: (e.after['iou'], e.name))
    chosen: list[Example] = []
    for kind, candidates in (
        ('gained most', gained),
        ('lost most', lost),
        ('best', best),
        ('worst', worst),
    ):
        taken = {example.name for example in chosen}
        free = [example for example in candidates if example.name not in taken]
        chosen += [Example(kind, e.name, e.before, e.after) for e in free[:per_kind]]
    return chosen


def read_images(work_dir: Path, names: list[str]) -> dict[str, bytes]:
    """JPEG files of pictures by their names in the archive, those that are there."""
    file = work_dir / FOLDER / IMAGES
    if not file.is_file():
        return {}
    with zipfile.ZipFile(file) as archive:
        there = set(archive.namelist())
        return {name: archive.read(name) for name in dict.fromkeys(names) if name in there}
