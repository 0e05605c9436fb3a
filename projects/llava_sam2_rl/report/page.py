"""The page: everything a run left in its folder, put into one self-contained HTML file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from projects.llava_sam2_rl.report.charts import MAX_POINTS, Curve, line_chart, number
from projects.llava_sam2_rl.report.logs import (
    Progress,
    Scalars,
    mean,
    read_progress,
    read_reward_parts,
    read_scalars,
)
from projects.llava_sam2_rl.report.pictures import (
    answered,
    asked,
    data_uri,
    decode_jpeg,
    picture_names,
    strip,
)
from projects.llava_sam2_rl.report.validations import Example, choose, read_images, read_validations

FILENAME = 'report.html'
#: Texts are cut at so many characters, the config's changes at so many lines.
MAX_TEXT, MAX_CHANGES = 600, 300

_DIRECTIONS = {
    'mask_to_caption': 'mask → caption → mask′',
    'caption_to_mask': 'caption → mask′ → caption′',
}
_LOOPS = {'loop1': _DIRECTIONS['mask_to_caption'], 'loop2': _DIRECTIONS['caption_to_mask']}
# Title, explanation, and keys of the log with their names. Charts without data are left out.
_CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        'Reward',
        'Mean over the rollouts of a step. Higher is better.',
        {f'{loop}/reward_mean': name for loop, name in _LOOPS.items()},
    ),
    (
        'KL',
        'How far the policy has moved from its reference.',
        {
            **{f'{loop}/kl_div': name for loop, name in _LOOPS.items()},
            'loop1/kl_loss': 'KL of the caption',
        },
    ),
    (
        'Completion length',
        'Tokens per sampled caption: a collapse shows here first.',
        {
            'loop1/completions/mean_length': 'mean',
            'loop1/completions/max_length': 'longest',
            'loop1/completions/min_length': 'shortest',
        },
    ),
    (
        'Held-out IoU',
        'Regions that training never sees.',
        {
            'cycle/return_iou': 'way back from the own caption',
            'cycle/own_iou': 'from the reference caption',
            'cycle/other_iou': 'from another caption (low is good)',
        },
    ),
    (
        'Held-out captions',
        'METEOR on regions that training never sees.',
        {
            'cycle/meteor': 'caption against reference',
            'cycle/caption_reward': 'caption → mask′ → caption′',
        },
    ),
    ('Loss', 'What is minimised; with rewards it need not fall.', {'loss': 'loss'}),
    (
        'Mask loss',
        'BCE + Dice of the masks.',
        {f'{loop}/mask_loss': name for loop, name in _LOOPS.items()},
    ),
)
# Name, explanation, and whether more is better.
_METRICS: dict[str, tuple[str, bool]] = {
    'cycle/return_iou': ('IoU, mask → caption → mask′', True),
    'cycle/meteor': ('METEOR of the caption', True),
    'cycle/caption_reward': ('METEOR, caption → mask′ → caption′', True),
    'cycle/own_iou': ('IoU from the region’s own reference caption', True),
    'cycle/other_iou': ('IoU from another region’s caption (should be low)', False),
    'cycle/listening_gap': ('own − other: does the segmenter listen?', True),
    'cycle/attribute_recall': ('share of the object’s attributes that the caption names', True),
    'cycle/wrong_attributes': ('attributes that a caption names wrongly', False),
}
# A smaller change of a mean over regions is not called better or worse.
_NOISE = 0.005
_NO_METRICS = ('time', 'data_time', 'step_time', 'memory')
_KINDS = {
    'gained most': 'IoU of the way back rose most between the two validations.',
    'lost most': 'It fell most.',
    'best': 'Highest IoU now, of those not shown above.',
    'worst': 'Lowest IoU now, of those not shown above.',
}


@dataclass(frozen=True)
class Report:
    """A finished page.

    Args:
        html: The whole file.
        examples: The held-out regions that it shows.
    """

    html: str
    examples: list[Example]


def make_report(work_dir: Path) -> Report:
    """Reads a run's folder and makes its page; parts without data say that there is none.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not work_dir.is_dir():
        raise FileNotFoundError(f'there is no folder {work_dir}: give the work directory of a run')
    scalars = read_scalars(work_dir)
    facts = _facts(work_dir)
    # Before the first line of the log there is nothing that could be of an earlier start.
    last = scalars.last_step or None
    first, latest = read_validations(work_dir, last)
    examples = choose(first, latest)
    rewards = read_reward_parts(work_dir, last)
    progress = read_progress(work_dir)
    drawn = 0 if latest is None else sum('found' in row for row in latest.rows.values())
    html = (
        _environment()
        .get_template('page.html.jinja')
        .render(
            name=work_dir.resolve().name,
            facts=facts,
            scalars=scalars,
            complete=0 < (facts['max_iters'] or 0) <= scalars.last_step,
            written=f'{datetime.now():%Y-%m-%d %H:%M}',
            tiles=_tiles(scalars),
            charts=_charts(scalars),
            max_points=MAX_POINTS,
            comparison=_comparison(scalars),
            noise=_NOISE,
            examples=_panels(work_dir, examples),
            num_drawn=drawn,
            num_regions=0 if latest is None else len(latest.rows),
            first=first,
            latest=latest,
            kinds=_KINDS,
            rewards=rewards,
            directions=_DIRECTIONS,
            progress=progress,
            skipped=sorted(progress.bad.items(), key=lambda item: -item[1]),
            phases=_phases(progress),
            speeds=_speeds(scalars, progress),
            max_changes=MAX_CHANGES,
        )
    )
    return Report(html, examples)


def _facts(work_dir: Path) -> dict[str, Any]:
    file = work_dir / 'report/run.json'
    facts = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
    nothing: dict[str, Any] = {
        'config_file': None,
        'max_iters': None,
        'config_changes': None,
        'environment': {},
        'starts': [],
    }
    return {**nothing, **facts}


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(number=_number, change=_change, duration=duration)
    return environment


def _shown(value: Any) -> Any:
    """Texts as a page can hold them: printable, and of bounded length.

    Control characters and lone surrogates are no HTML, and characters that turn the direction of
    writing could make a caption read as what it is not.
    """
    # Markup is what this package made itself: charts and pictures.
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    printable = ''.join(c if c.isprintable() or c == '\n' else '�' for c in value[: MAX_TEXT + 1])
    return printable if len(value) <= MAX_TEXT else printable[:MAX_TEXT] + ' … (cut off)'


def _number(value: float | None) -> str:
    return '–' if value is None else number(value)


def _change(value: float) -> str:
    sign = '−' if value < 0 else '+'
    return f'{sign}{abs(value):.3f}'


def duration(seconds: float) -> str:
    """``3 h 07 min``, ``7 min 05 s`` or ``5.1 s``."""
    if seconds < 60:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f'{minutes} min {rest:02d} s'
    return f'{minutes // 60} h {minutes % 60:02d} min'


def _charts(scalars: Scalars) -> list[dict[str, Any]]:
    charts = []
    for title, explanation, keys in _CHARTS:
        curves = [Curve(name, scalars.curve(key)) for key, name in keys.items()]
        curves = [curve for curve in curves if curve.finite]
        if curves:
            charts.append(
                {
                    'title': title,
                    'explanation': explanation,
                    'svg': line_chart(title, curves),
                    'curves': curves,
                    'thinned': max(len(curve.points) for curve in curves) > MAX_POINTS,
                    'gaps': sum(len(curve.points) - len(curve.finite) for curve in curves),
                }
            )
    return charts


def _comparison(scalars: Scalars) -> dict[str, Any] | None:
    """The first and the latest validation side by side."""
    rows = {
        step: {k: v for k, v in row.items() if k not in _NO_METRICS and not k.startswith('time/')}
        for step, row in scalars.validation.items()
    }
    rows = {step: row for step, row in rows.items() if row}
    if not rows:
        return None
    first, latest = min(rows), max(rows)
    table = []
    for key in dict.fromkeys([*rows[first], *rows[latest]]):
        name, up = _METRICS.get(key, (key, None))
        before, after = rows[first].get(key), rows[latest].get(key)
        gain = None if before is None or after is None else after - before
        verdict = ''
        if gain is not None and abs(gain) >= _NOISE and up is not None:
            verdict = 'better' if (gain > 0) == up else 'worse'
        table.append(
            {'name': name, 'before': before, 'after': after, 'gain': gain, 'verdict': verdict}
        )
    return {'first': first, 'latest': latest, 'single': first == latest, 'rows': table}


def _tiles(scalars: Scalars) -> list[dict[str, str]]:
    """The numbers that people ask for first."""
    tiles = []
    for key, name in (
        ('cycle/return_iou', 'held-out IoU of the way back'),
        ('cycle/meteor', 'held-out METEOR'),
        ('loop1/reward_mean', 'reward, mask → caption'),
        ('loop2/reward_mean', 'reward, caption → mask'),
    ):
        points = Curve(name, scalars.curve(key)).finite
        if not points:
            continue
        if key.startswith('cycle'):
            start, end, note = points[0][1], points[-1][1], f'steps {points[0][0]}–{points[-1][0]}'
        else:
            # Rewards of a step scatter: a tenth of the logged steps at either end.
            share = max(1, len(points) // 10)
            start = float(np.mean([value for _, value in points[:share]]))
            end = float(np.mean([value for _, value in points[-share:]]))
            note = 'first and last logged steps' if share == 1 else f'means of {share} logged steps'
        if len(points) == 1:
            tiles.append({'name': name, 'value': f'{end:.3f}', 'note': f'step {points[0][0]}'})
        else:
            tiles.append({'name': name, 'value': f'{start:.3f} → {end:.3f}', 'note': note})
    return tiles


def _panels(work_dir: Path, examples: list[Example]) -> list[dict[str, Any]]:
    """Pictures and texts of the examples, in their order."""
    images = _read_pictures(work_dir, examples)
    shown = []
    for example in examples:
        row = example.after
        if not images.keys() >= set(picture_names(row)):
            continue
        shown.append(
            {
                'example': example,
                'asked': data_uri(asked(images[row['image']], row)),
                'answers': [
                    {'when': when, 'row': answer, 'picture': data_uri(answered(images, answer))}
                    for when, answer in (('before', example.before), ('after', row))
                    if answer is not None
                ],
            }
        )
    return shown


def _phases(progress: Progress) -> list[dict[str, Any]]:
    total = sum(progress.seconds.values())
    return [
        {'name': name, 'seconds': seconds, 'share': seconds / total}
        for name, seconds in sorted(progress.seconds.items(), key=lambda item: -item[1])
        if total > 0
    ]


def _speeds(scalars: Scalars, progress: Progress) -> list[tuple[str, str]]:
    """Times of a step and memory, as logged."""
    names = {'time': 'a step', 'data_time': 'of it, waiting for data'}
    for key in scalars.keys():  # noqa: SIM118
        if key.startswith('time/'):
            names[key] = f'{"behind" if key.endswith("_hidden") else "of"} it, {key[5:]}'
    rows = []
    for key, name in names.items():
        value = mean(value for _, value in scalars.curve(key))
        if value is not None:
            rows.append((f'{name} (mean)', duration(value) if value >= 60 else f'{value:.3f} s'))
    memory = [value for _, value in scalars.curve('memory')]
    if memory:
        rows.append(('GPU memory, peak of the main process', f'{max(memory) / 1024:.2f} GiB'))
    if progress.host_memory:
        size = progress.host_memory / 2**30
        rows.append(('host memory, peak of the main process', f'{size:.2f} GiB'))
    return rows


def example_pictures(work_dir: Path, examples: list[Example]) -> dict[str, np.ndarray]:
    """``kind_n`` -> ``(h, w, 3)`` uint8: region, before and after, side by side."""
    images = _read_pictures(work_dir, examples)
    pictures = {}
    for n, example in enumerate(examples):
        row = example.after
        if images.keys() >= set(picture_names(row)):
            rank = sum(other.kind == example.kind for other in examples[:n]) + 1
            answers = [a for a in (example.before, row) if a is not None]
            pictures[f'{example.kind.replace(" ", "_")}_{rank}'] = strip(
                [asked(images[row['image']], row)]
                + [answered(images, answer) for answer in answers]
            )
    return pictures


def _read_pictures(work_dir: Path, examples: list[Example]) -> dict[str, np.ndarray]:
    wanted = [name for example in examples for name in picture_names(example.after)]
    return {name: decode_jpeg(data) for name, data in read_images(work_dir, wanted).items()}
