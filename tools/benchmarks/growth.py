"""How a GRPO step grows with G, with the batch, and with the number of images.

With G: the ideal is that encoders and prefill cost the same for every G and all else grows
linearly; their share is read from the phases of the step with the smallest G. With the batch and
with the images (of the encoders alone): linear, from the smallest number. `measured / ideal` above
1 is worse than ideal, below 1 is what larger batches save.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from . import common

#: Phases that should not grow with G.
CONSTANT = ('encode', 'prefill')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py growth``."""
    common.add_arguments(parser)
    parser.add_argument(
        '--groups', type=int, nargs='+', default=[2, 4, 8, 16], help='values of G (%(default)s)'
    )
    parser.add_argument(
        '--batches', type=int, nargs='+', default=[1, 2, 4], help='values of B (%(default)s)'
    )
    parser.add_argument(
        '--images', type=int, nargs='+', default=[1, 2, 4, 8], help='images (%(default)s)'
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times every number.

    Returns:
        A row per number: median seconds, what the ideal says, and their ratio.
    """
    return [row for model in args.models for row in rows(model, args)]


def rows(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One model."""
    from . import step

    model = common.build_model(size, step.objective(args.groups[0]), args)
    count = common.batch_size(size, args)
    found: list[dict[str, Any]] = []

    batch = common.make_batch(model, count, args.device)
    seconds, constants = {}, {}
    for group in args.groups:
        model.objective = step.objective(group)
        model.objective.setup(model.policy, model.objective.directions, model.max_new_tokens)
        seconds[group], constants[group] = timed(step.ours(model, batch), args)
    small = args.groups[0]
    fixed = constants[small]
    for group in args.groups:
        ideal = fixed + (seconds[small] - fixed) * group / small
        found.append(_row(size, f'G (B {count})', group, seconds[group], ideal))

    model.objective = step.objective(args.groups[0])
    model.objective.setup(model.policy, model.objective.directions, model.max_new_tokens)
    for number in args.batches:
        batch = common.make_batch(model, number, args.device)
        seconds[number], _ = timed(step.ours(model, batch), args)
        ideal = seconds[args.batches[0]] * number / args.batches[0]
        found.append(_row(size, f'B (G {small})', number, seconds[number], ideal))

    for number in args.images:
        data = common.make_batch(model, number, args.device)['data']
        with torch.no_grad():
            seconds[number], _ = timed(lambda data=data: model.encode(data), args)
        ideal = seconds[args.images[0]] * number / args.images[0]
        found.append(_row(size, 'images (encoders)', number, seconds[number], ideal))
    return found


def timed(work: Callable[[], Any], args: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of a call, and of its `CONSTANT` phases."""
    from projects.llava_sam2_rl.engine.timing import phases

    constant: list[float] = []

    def counted() -> None:
        phases.take()
        work()
        spent = phases.take()
        constant.append(sum(spent[name].seconds for name in CONSTANT if name in spent))

    if torch.device(args.device).type == 'cuda':
        phases.synchronize = lambda: common.wait(args.device)
    try:
        seconds = common.in_turns({'step': counted}, args.rounds, args.device)['step']
    finally:
        phases.synchronize = None
    return seconds, statistics.median(constant[-args.rounds :])


def _row(size: str, what: str, number: int, seconds: float, ideal: float) -> dict[str, Any]:
    return {
        'model': size,
        'grows': what,
        'number': number,
        'seconds': seconds,
        'ideal s': ideal,
        'measured / ideal': seconds / ideal,
    }
