"""What a step on several ranks under ZeRO-2 spends beside the model's own work.

Real runs of `tools/train.py` (torchrun, one thread a rank), GRPO in both directions, one rank and
several with the same batch a rank. `work` is encoders, generation, return trips, rewards,
log-probs, forward, backward and the optimizer's step, in which the ranks also exchange gradients;
`frame` is all the rest of the wall time of a step: waiting for data and for the other ranks'
losses, logging, hooks, the teacher. Medians over the steps behind the warm-up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import common

#: Phases that are not the model's own work.
FRAME = ('data_wait', 'exchange', 'teacher')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py scale``."""
    parser.add_argument(
        '--models',
        nargs='+',
        choices=('tiny', '100m'),
        default=['tiny', '100m'],
        help='%(choices)s',
    )
    parser.add_argument(
        '--ranks', type=int, nargs='+', default=[1, 2], help='processes (%(default)s)'
    )
    parser.add_argument(
        '--batch', type=int, help='samples a rank (default: 4 of the tiny model, 2 of others)'
    )
    parser.add_argument('--group', type=int, default=4, help='G (%(default)s)')
    parser.add_argument('--tokens', type=int, default=32, help='longest caption (%(default)s)')
    parser.add_argument('--steps', type=int, default=6, help='timed steps (%(default)s)')
    parser.add_argument('--warm-up', type=int, default=2, help='steps before them (%(default)s)')
    parser.add_argument(
        '--deepspeed',
        default=str(common.ROOT / 'configs/deepspeed/zero2_fp32.json'),
        help='DeepSpeed config (default: configs/deepspeed/zero2_fp32.json)',
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains every model on every number of ranks.

    Returns:
        A row per run: seconds of a step, shares of it, and the throughput per rank as a share of
        the first run's.
    """
    rows: list[dict[str, Any]] = []
    for model in args.models:
        first, batch = None, args.batch or (4 if model == 'tiny' else 2)
        for ranks in args.ranks:
            with tempfile.TemporaryDirectory() as folder:
                steps = train(model, ranks, batch, args, Path(folder))
            found = row(steps[args.warm_up :])
            first = first or found['step s']
            rows.append(
                {
                    'model': model,
                    'ranks': ranks,
                    'B a rank': batch,
                    **found,
                    'speed of a rank': first / found['step s'],
                }
            )
    return rows


def train(
    model: str, ranks: int, batch: int, args: argparse.Namespace, folder: Path
) -> list[Mapping[str, float]]:
    """What rank 0 logged of each step.

    Raises:
        RuntimeError: The training failed; the message ends with its output.
    """
    from projects.llava_sam2_rl.report.logs import read_scalars

    config = write_config(model, args.tokens, folder / f'{model}.py')
    total = args.warm_up + args.steps
    options = {
        'train_cfg.max_iters': total,
        'train_dataloader.batch_size': batch,
        'model.objective.num_generations': args.group,
        'default_hooks.logger.interval': 1,
        'log_processor.window_size': 1,
        'default_hooks.checkpoint.interval': 10 * total,
    }
    command = [
        *(sys.executable, '-m', 'torch.distributed.run', '--standalone'),
        *('--nproc_per_node', str(ranks), str(common.ROOT / 'tools/train.py'), str(config)),
        *('--launcher', 'pytorch', '--deepspeed', args.deepspeed),
        *('--work-dir', str(folder / 'run')),
        *('--cfg-options', *(f'{key}={value}' for key, value in options.items())),
    ]
    # As torchrun does by itself for several processes; alike for one.
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        command, cwd=common.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f'{model} on {ranks} ranks failed:\n{(done.stdout + done.stderr)[-4000:]}'
        )
    logged = read_scalars(folder / 'run').training
    if len(logged) != total:
        raise RuntimeError(f'{model} on {ranks} ranks logged {len(logged)} steps of {total}')
    return list(logged.values())


def write_config(model: str, tokens: int, file: Path) -> Path:
    """The tiny GRPO config with another model, no validation and no pictures."""
    from mmengine.config import Config

    config = Config.fromfile(common.ROOT / 'configs/sa2va_tiny_dual_loop.py')
    if model != 'tiny':
        base = Config.fromfile(common.ROOT / f'configs/_base_/models/sa2va_{model}.py')
        config.model.policy = base.model.policy
    config.model.max_new_tokens = tokens
    for key in ('val_dataloader', 'val_evaluator', 'val_cfg'):
        config[key] = None
    for name in ('rollouts', 'report', 'resumed_validation'):
        del config.default_hooks[name]
    config.dump(file)
    return file


def row(steps: list[Mapping[str, float]]) -> dict[str, float]:
    """Medians of the shares.

    Args:
        steps: ``time`` and ``time/<phase>`` in seconds.
    """
    from projects.llava_sam2_rl.engine.timing import PHASES

    work = [name for name in PHASES if name not in FRAME]

    def seconds(step: Mapping[str, float], *names: str) -> float:
        return sum(step.get(f'time/{name}', 0.0) for name in names)

    def share(*names: str) -> float:
        return 100 * statistics.median(seconds(step, *names) / step['time'] for step in steps)

    return {
        'step s': statistics.median(step['time'] for step in steps),
        'generation %': share('prefill', 'decode'),
        'backward %': share('backward'),
        'optimizer %': share('optimizer'),
        'frame %': 100
        * statistics.median(1 - seconds(step, *work) / step['time'] for step in steps),
        'exchange of losses %': share('exchange'),
        'data wait %': share('data_wait'),
        'teacher %': share('teacher'),
    }
