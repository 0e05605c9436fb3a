"""A step under ZeRO-3 with weights in parts, decoding either way, against one under ZeRO-2.

GRPO in both directions in float32, on ranks of this machine (torchrun, one thread a rank), whose
images, captions and random draws differ. A process has an engine for each way; they take steps in
turns, so that a busy moment hits all alike, on the same images from the same state of the random
generator. `agreements` are the messages of a step by which ranks agree on a gather, `gathers` the
gathers themselves, `gathered MB` their bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common

#: Way -> stage of ZeRO, and ``gather_for_rollout``.
WAYS = {
    'ZeRO-2': (2, False),
    'ZeRO-3, layer by layer': (3, False),
    'ZeRO-3, gather_for_rollout': (3, True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py zero``."""
    parser.add_argument(
        '--models', nargs='+', choices=('tiny', '100m'), default=['100m'], help='%(choices)s'
    )
    parser.add_argument('--ranks', type=int, default=2, help='processes (%(default)s)')
    parser.add_argument('--batch', type=int, default=2, help='samples a rank (%(default)s)')
    parser.add_argument('--group', type=int, default=4, help='G (%(default)s)')
    parser.add_argument('--tokens', type=int, default=32, help='longest caption (%(default)s)')
    parser.add_argument('--rounds', type=int, default=5, help='timed rounds (%(default)s)')
    parser.add_argument(
        '--threshold',
        type=int,
        default=100_000,
        help='elements up to which a tensor stays whole (default: %(default)s, that of '
        'deepspeed_zero3)',
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each model and way.

    Raises:
        RuntimeError: The ranks failed; the message ends with their output.
    """
    rows = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            job, found = Path(folder, 'job.json'), Path(folder, 'found.json')
            job.write_text(json.dumps({**vars(args), 'model': model, 'found': str(found)}))
            command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
            command += ['--nproc_per_node', str(args.ranks), '-m', 'benchmarks.zero', str(job)]
            paths = [str(common.ROOT), str(common.ROOT / 'tools'), os.environ.get('PYTHONPATH', '')]
            environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ':'.join(paths)}
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                text = (done.stdout + done.stderr)[-9000:]
                raise RuntimeError(f'{model} on {args.ranks} ranks failed:\n{text}')
            rows += json.loads(found.read_text())
    return rows


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model, on each rank."""
    from projects.llava_sam2_rl.engine.launch import prepare

    prepare('pytorch', 'a.json')
    counted: dict[str, dict[str, int]] = {}
    steps = {}
    for way, (stage, at_once) in WAYS.items():
        counted[way] = {'agreements': 0, 'gathers': 0, 'bytes': 0}
        steps[way] = make_step(args, stage, at_once, counted[way])
    seconds = common.in_turns(steps, args.rounds)
    # Those of the warm-up are as many as those of a timed step.
    counts = {
        way: {name: value / (args.rounds + 1) for name, value in found.items()}
        for way, found in counted.items()
    }
    return [
        {
            'model': args.model,
            'ranks': args.ranks,
            'B a rank': args.batch,
            'way': way,
            'step s': seconds[way],
            'to ZeRO-2': seconds[way] / seconds['ZeRO-2'],
            'agreements': round(counts[way]['agreements']),
            'gathers': round(counts[way]['gathers']),
            'gathered MB': counts[way]['bytes'] / 1e6,
        }
        for way in WAYS
    ]


def make_step(
    args: argparse.Namespace, stage: int, at_once: bool, counted: dict[str, int]
) -> Callable[[], None]:
    """One training step of a way; what it gathers is added to ``counted``."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper
    from mmengine.config import Config

    from projects.llava_sam2_rl.engine import split_weights
    from projects.llava_sam2_rl.engine.deepspeed import DualLoopEngine
    from projects.llava_sam2_rl.registry import OBJECTIVES

    objective = Config.fromfile(common.ROOT / 'configs/sa2va_tiny_dual_loop.py').model.objective
    objective.num_generations = args.group
    args.device = 'cpu'
    made_of = OBJECTIVES.build(objective)
    model = common.build_model(args.model, made_of, args, gather_for_rollout=at_once)
    config = json.loads((common.ROOT / f'configs/deepspeed/zero{stage}_fp32.json').read_text())
    if stage == 3:
        config['zero_optimization']['stage3_param_persistence_threshold'] = args.threshold
    config.update(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=1.0
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine = DualLoopEngine(model=made)
    engine.after_step.append(model.update_teacher)
    wrapper = DeepSpeedOptimWrapper(optimizer)
    wrapper.model = engine
    batch = common.make_batch(model, args.batch, start=args.batch * dist.get_rank())
    gather = split_weights._all_gather

    def counting(found: Any, own: Any, **options: Any) -> Any:
        # Ranks agree in a group of their own.
        counted['agreements'] += bool(options)
        counted['bytes'] += 0 if options else found.nbytes
        return gather(found, own, **options)

    def count(*_: int) -> None:
        counted['gathers'] += 1

    if isinstance(engine.weights, split_weights.SplitWeights):
        engine.weights.watchers.append(count)

    def step() -> None:
        # The seed of the round, and other draws on each rank.
        torch.manual_seed(torch.initial_seed() * dist.get_world_size() + dist.get_rank())
        split_weights._all_gather = counting
        engine.train_step(batch, wrapper)
        dist.barrier()
        split_weights._all_gather = gather

    return step


def main(job: str) -> None:
    """What a rank does."""
    import torch.distributed as dist

    options = json.loads(Path(job).read_text())
    rows = measure(argparse.Namespace(**options))
    if dist.get_rank() == 0:
        Path(options['found']).write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1])
