"""Reads the first record of every data source, and builds the metrics and the objective.

Each in a process of its own, so that whatever the class of a user does (a constructor that reads
for minutes, a transform that takes all memory) ends with the check.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from mmengine.config import Config

from projects.llava_sam2_rl.engine.dataloader_config import bare_name
from projects.llava_sam2_rl.preflight.files import (
    Source,
    check_paths,
    find_sources,
    model_sizes,
)
from projects.llava_sam2_rl.preflight.problems import Problem
from projects.llava_sam2_rl.registry import DATASETS, METRICS, OBJECTIVES
from projects.llava_sam2_rl.structures import ClipSample

#: Longest time for all of them, in seconds.
SECONDS = 4.0
_AT_ONCE = 4

#: What a check in a process of its own answers: option, message, fix.
Answer = list[tuple[str, str, str]]


@dataclass(frozen=True)
class _Task:
    where: str
    name: str
    do: Callable[[], Answer]


def check_data(cfg: Config, stage: str, seconds: float = SECONDS) -> list[Problem]:
    """What the data, the transforms, the metrics and the objective of a stage would fail by.

    Args:
        cfg: Config of a run.
        stage: ``'train'`` (with its validation) or ``'test'``.
        seconds: Time for all of it. What is not done by then is left to the run, with a remark.
    """
    sources, found = find_sources(cfg, stage)
    sizes = model_sizes(cfg)
    tasks = []
    for source in sources:
        missing = check_paths(source)
        found += missing
        if not missing:
            tasks.append(_Task(source.where, source.name, partial(_first, source, sizes)))
    evaluator = f'{"val" if stage == "train" else "test"}_evaluator'
    for where, node in _metrics(cfg.get(evaluator), evaluator):
        name = bare_name(dict.__getitem__(node, 'type'))
        tasks.append(_Task(where, name, partial(_build, METRICS.build, node)))
    objective = cfg.model.get('objective')
    if stage == 'train' and isinstance(objective, dict) and 'type' in objective:
        name = bare_name(dict.__getitem__(objective, 'type'))
        tasks.append(_Task('model.objective', name, partial(_build, OBJECTIVES.build, objective)))
    return _merged([*found, *_run(tasks, seconds)])


def _metrics(value: Any, where: str) -> Iterator[tuple[str, dict]]:
    if isinstance(value, dict):
        if 'type' in value:
            yield where, value
    elif isinstance(value, list | tuple):
        for n, item in enumerate(value):
            yield from _metrics(item, f'{where}.{n}')


def _build(build: Callable[[dict], Any], node: dict) -> Answer:
    # Keys are the judge's check's; what is built here asks nobody.
    for name in _key_names(node):
        os.environ.setdefault(name, 'none')
    build(node)
    return []


def _key_names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        given = value.get('api_key_env')
        if isinstance(given, str):
            yield given
        for key in value:
            if key != 'type':
                yield from _key_names(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _key_names(item)


def _first(source: Source, sizes: Mapping[str, Any] | None) -> Answer:
    """Builds a source, reads its first record, and compares it with the model."""
    dataset = DATASETS.build(source.options)
    if len(dataset) == 0:
        return [('', 'it has no record at all', 'point it at other data, or leave it out')]
    item = dataset[0]
    if sizes is None or not isinstance(item, Mapping):
        return []
    # The frames of a clip that is asked about are resized when the model needs them.
    if isinstance(item.get('clip'), ClipSample):
        return []
    return item_sizes(item, sizes)


def item_sizes(item: Mapping[str, Any], sizes: Mapping[str, Any]) -> Answer:
    """Where an item of a transform is not what the model takes.

    Args:
        item: As `Sa2VATransform` describes it.
        sizes: From `model_sizes`.
    """
    side, grounding = sizes['image_size'], sizes['grounding_size']
    grid = int(side // sizes['patch_size'] * sizes['downsample_ratio'])
    wanted = {
        'pixel_values': (None, 3, side, side),
        'g_pixel_values': (3, grounding, grounding),
        'prompt_masks': (None, grid, grid),
    }
    found = []
    fix = "leave the sizes out (Sa2VATransform takes the model's), or give those of the model"
    for name, shape in wanted.items():
        value = item.get(name)
        if value is None:
            text = f'its item has no {name!r}, of which the model takes {_sizes(shape)}'
            found.append(('transforms', text, 'docs/datasets.md has what an item holds'))
            continue
        own = tuple(getattr(value, 'shape', ()))
        fits = len(own) == len(shape) and all(b in (None, a) for a, b in zip(own, shape))
        if not fits:
            text = f'it makes {name} of {_sizes(own)}, the model takes {_sizes(shape)}'
            found.append(('transforms', text, fix))
    return found


def _sizes(shape: Sequence[int | None]) -> str:
    return ' x '.join('any' if n is None else str(n) for n in shape) or 'no shape'


def _run(tasks: Sequence[_Task], seconds: float) -> Iterator[Problem]:
    """Does the tasks, a few at a time; each has its share of the time."""
    end = time.monotonic() + seconds
    share = max(0.5, seconds * _AT_ONCE / max(len(tasks), _AT_ONCE))
    context = multiprocessing.get_context('fork')
    waiting = list(tasks)
    running: dict[Connection, tuple[_Task, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < _AT_ONCE:
            task = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(task.do, theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (task, process, min(end, time.monotonic() + share))
        nearest = min(limit for _, _, limit in running.values())
        ready = wait(list(running), max(0.0, nearest - time.monotonic()))
        for ours in [one for one in running if one in ready]:
            task, process, _ = running.pop(ours)
            yield from _answer(task, process, ours)
        for ours, (task, process, limit) in list(running.items()):
            if time.monotonic() >= limit:
                del running[ours]
                process.kill()
                process.join()
                yield Problem(
                    task.where,
                    f'{task.name} is not built within {share:.1f} s: the rest of it is unchecked',
                    'python tools/verify_datasets.py reads all of the data',
                    fatal=False,
                )


def _child(do: Callable[[], Answer], pipe: Connection) -> None:
    """Runs one task, silent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)  # a forked process has no other threads
    try:
        pipe.send(do())
    # A class of the user's may raise anything.
    except Exception as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        named = text if len(text) > 10 else f'{type(error).__name__}: {text}'
        pipe.send([('', named, '')])
    pipe.close()
    os._exit(0)


def _answer(task: _Task, process: Any, pipe: Connection) -> Iterator[Problem]:
    try:
        answer: Answer = pipe.recv()
    except EOFError:
        process.join()
        text = f'building {task.name} ends the process (exit status {process.exitcode})'
        answer = [('', text, 'see that its first record fits into memory')]
    process.join()
    for option, text, fix in answer:
        where = f'{task.where}.{option}' if option else task.where
        message = text if task.name in text else f'{text} ({task.name})'
        yield Problem(where, message, fix or f'correct the options of {task.where}')


def _merged(problems: Sequence[Problem]) -> list[Problem]:
    """One problem for all places of the same message."""
    places: dict[tuple[str, bool], list[Problem]] = {}
    for problem in problems:
        places.setdefault((problem.message, problem.fatal), []).append(problem)
    merged = []
    for (message, fatal), same in places.items():
        others = sorted({p.key for p in same} - {same[0].key})
        more = f' (so {", ".join(others[:3])}{", …" if len(others) > 3 else ""})' if others else ''
        merged.append(Problem(same[0].key, message + more, same[0].fix, fatal))
    return merged
