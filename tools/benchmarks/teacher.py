"""What the teacher costs: its move and its swaps as a share of a step, and its memory.

Beside it the copy of a whole model: a copy moves all its parameters, and is held in full.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py teacher``."""
    common.add_arguments(parser)
    parser.add_argument('--group', type=int, default=4, help='G of the step (%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times both.

    Returns:
        A row per model: milliseconds of one move and of the swaps of a GRPO step (one for each
        return trip; the references are part of the first), their share of the step, and bytes.
    """
    return [row(model, args) for model in args.models]


def row(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model."""
    from . import step
    from .original import Original

    model = common.build_model(size, step.objective(args.group), args)
    batch = common.make_batch(model, common.batch_size(size, args), args.device)
    whole = Original(model)

    def swap() -> None:
        for _ in range(2):
            with model.teacher_applied():
                pass

    ways = {
        'move': model.update_teacher,
        'swap': swap,
        'copy': whole.update_teacher,
    }
    seconds = common.in_turns(ways, 10 * args.rounds, args.device)
    seconds |= common.in_turns({'step': step.ours(model, batch)}, args.rounds, args.device)
    trainable = sum(p.numel() for p in model.policy.parameters() if p.requires_grad)
    held = sum(shadow.nbytes for shadow in model.teacher.state_dict()['shadows'].values())
    copied = sum(p.numel() * p.element_size() for p in whole.teacher.parameters())
    del whole
    torch.manual_seed(0)
    return {
        'model': size,
        'step s': seconds['step'],
        'move ms': 1e3 * seconds['move'],
        'two swaps ms': 1e3 * seconds['swap'],
        'share of the step %': 100 * (seconds['move'] + seconds['swap']) / seconds['step'],
        'move of a copy ms': 1e3 * seconds['copy'],
        'bytes per trainable parameter': held / trainable,
        'MB': held / 1e6,
        'MB of a copy': copied / 1e6,
    }
