"""A step under ZeRO-3 with weights in parts, decoding either way, against one under ZeRO-2.

GRPO in both directions in float32, on ranks of this machine (one thread each), whose images,
captions and random draws differ. A process has an engine for each way; they take steps in turns, so
that a busy moment hits all alike, on the same images from the same state of the random generator.
`agreements` are the messages of a step by which ranks agree on a gather, `gathers` the gathers
themselves, `gathered MB` their bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from . import common, ranks

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
        RuntimeError: A rank failed; the message ends with its log.
    """
    rows: list[dict[str, Any]] = []
    for model in args.models:
        # Those of rank 0: a step is over when all ranks are done with it.
        rows += ranks.run_ranks(__name__, args.ranks, {**vars(args), 'model': model})[0]
    return rows


def on_rank(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
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
    import torch
    import torch.distributed as dist
    from mmengine.config import Config

    from projects.llava_sam2_rl.engine import split_weights
    from projects.llava_sam2_rl.registry import OBJECTIVES

    objective = Config.fromfile(common.ROOT / 'configs/sa2va_tiny_dual_loop.py').model.objective
    objective.num_generations = args.group
    args.device = 'cpu'
    made_of = OBJECTIVES.build(objective)
    model = common.build_model(args.model, made_of, args, gather_for_rollout=at_once)
    zero = {'stage3_param_persistence_threshold': args.threshold} if stage == 3 else {}
    engine, wrapper = ranks.build_engine(model, stage, **zero)
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
