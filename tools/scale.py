"""How a GRPO config's step grows from one GPU to many nodes, and what breaks first: a prediction.

The step is made of FLOPs, of bytes that decoding reads, of kernels that the host has to launch, and
of what goes over the network: the bytes of each collective and its latency. Sizes come from the
config, whose model is built without weights. The machine's constants are options; the defaults are
data sheets and, where these promise more than code reaches, shares named below. --measure takes
the network's constants and the work of a rank from runs of this machine on 1 rank, between 2 ranks
the network, and compares what they predict with runs on 2 and 4.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))

from benchmarks.cluster import (  # noqa: E402
    FLOAT,
    Job,
    Machine,
    expected_maximum,
    read_job,
    step,
    traffic,
    what_breaks_first,
)

EXAMPLES = """\
examples:
  python tools/scale.py configs/sa2va_4b_dual_loop.py --nodes 1 4 16 64 --zero 2
  python tools/scale.py configs/sa2va_4b_dual_loop_judge.py --nodes 1 4 16 64 --judge-rate 200
  python tools/scale.py configs/sa2va_tiny_dual_loop.py --measure
"""
# ------------------------------------------------------------- measured here


def time_collectives() -> None:
    """Prints latency and bandwidth of this machine's gloo; one of two ranks of torchrun."""
    import torch
    from torch import distributed

    distributed.init_process_group('gloo')

    def seconds(size: int, rounds: int) -> float:
        values, taken = torch.zeros(size // FLOAT), []
        for _ in range(rounds):
            started = time.perf_counter()
            distributed.all_reduce(values)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    small, size = seconds(64, 200), 2**24
    large = seconds(size, 20)
    if distributed.get_rank() == 0:
        # Between two ranks: two hops, and as many bytes as the tensor has.
        print(f'latency {small / 2} bandwidth {size / (large - small)}')
    distributed.destroy_process_group()


def measure(args: Any) -> list[str]:
    """Predicts runs on several ranks of this machine from a run on one, and compares."""
    import subprocess

    from benchmarks import scale
    from mmengine.config import Config

    cores, others = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += ['--nproc_per_node', '2', __file__, '--time-collectives']
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    machine = Machine(
        node_latency=float(said[said.index('latency') + 1]),
        node_bandwidth=float(said[said.index('bandwidth') + 1]),
        per_node=max(args.ranks),
    )
    steps: dict[int, list[Mapping[str, float]]] = {}
    options = argparse.Namespace(
        tokens=args.tokens or 32,
        group=args.group or 4,
        steps=args.steps,
        warm_up=2,
        deepspeed=str(ROOT / 'configs/deepspeed/zero2_fp32.json'),
    )
    batch = args.batch or 4
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted({1, *args.ranks}):
            place = Path(folder, str(ranks))
            place.mkdir()
            steps[ranks] = scale.train('tiny', ranks, batch, options, place)[options.warm_up :]
        config = Config.fromfile(scale.write_config('tiny', options.tokens, Path(folder, 'c.py')))
    job = read_job(config, batch, options.group, options.tokens)
    lines = [
        f'gloo between 2 ranks: {machine.node_latency * 1e6:.0f} us, '
        f'{machine.node_bandwidth / 1e9:.2f} GB/s; {cores} cores, {others:.0f} '
        'processes beside; a rank alone takes '
        f'{statistics.median(step["time"] for step in steps[1]):.3f} s a step',
        '| ranks | predicted s | measured s | off by |',
        '| --- | --- | --- | --- |',
    ]
    for ranks in args.ranks:
        expected = predicted_from(steps[1], job, machine, ranks, cores, others)
        found = statistics.median(step['time'] for step in steps[ranks])
        lines.append(
            f'| {ranks} | {expected:.3f} | {found:.3f} | {100 * (expected / found - 1):+.0f} % |'
        )
    return lines


def predicted_from(
    alone: Sequence[Mapping[str, float]],
    job: Job,
    machine: Machine,
    ranks: int,
    cores: int,
    others: float = 0.0,
) -> float:
    """Seconds of a step on W ranks under ZeRO-2, from the steps of a rank alone.

    Every step waits for the slowest of W draws from the steps of one rank; collectives come on top.
    Ranks that are more than the cores share them, with each other and with what else runs, as the
    rank alone did.

    Args:
        alone: ``time`` of each step.
        job: Of the config.
        machine: Its network.
        ranks: W.
        cores: Of the machine.
        others: Processes that run beside. Defaults to 0.
    """
    crowding = max(1.0, (ranks + others) / cores) / max(1.0, (1 + others) / cores)
    network = sum(
        machine.collective(kind, size, calls, ranks)
        for kind, size, calls in traffic(job, ranks, 2).values()
    )
    return crowding * expected_maximum([step['time'] for step in alone], ranks) + network


# -------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', nargs='?', help='config file')
    parser.add_argument('--nodes', type=int, nargs='+', default=[1, 4, 16, 64])
    parser.add_argument('--zero', type=int, choices=[0, 1, 2, 3], default=0, help='0: DDP')
    parser.add_argument('--batch', type=int, help="samples per rank (default: the config's)")
    parser.add_argument('--group', type=int, help="G, rollouts (default: the config's)")
    parser.add_argument('--tokens', type=int, help="longest caption (default: the config's)")
    parser.add_argument(
        '--mean', type=float, help='mean length of captions, in tokens (default: half the longest)'
    )
    parser.add_argument(
        '--spread', type=float, help='standard deviation of it (default: a quarter of the longest)'
    )
    parser.add_argument('--judge-rate', type=float, help='requests a second the judge answers')
    parser.add_argument(
        '--storage', type=float, default=2e9, help='bytes a second of the data (%(default)s)'
    )
    for field in dataclasses.fields(Machine):
        parser.add_argument(
            f'--{field.name.replace("_", "-")}',
            type=int if field.name == 'per_node' else float,
            default=field.default,
            help='see Machine in tools/benchmarks/cluster.py (%(default)s)',
        )
    parser.add_argument('--measure', action='store_true', help='compare with runs on this machine')
    parser.add_argument('--ranks', type=int, nargs='+', default=[2, 4], help='of --measure')
    parser.add_argument('--steps', type=int, default=10, help='of --measure (%(default)s)')
    parser.add_argument('--time-collectives', action='store_true', help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the table, and what breaks first."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.time_collectives:
        time_collectives()
        return 0
    if args.measure:
        print('\n'.join(measure(args)))
        return 0
    if args.config is None:
        parser.error('name a config, or --measure')
    if not Path(args.config).is_file():
        parser.error(f'there is no config {args.config}')
    from mmengine.config import Config

    job = read_job(Config.fromfile(args.config), args.batch, args.group, args.tokens)
    machine = Machine(**{x.name: getattr(args, x.name) for x in dataclasses.fields(Machine)})
    args.mean = args.mean or job.sizes.tokens / 2
    args.spread = args.spread or job.sizes.tokens / 4

    def seconds(ranks: int) -> dict[str, float]:
        return step(job, machine, ranks, args.zero, (args.mean, args.spread))

    found = {nodes: seconds(nodes * machine.per_node) for nodes in args.nodes}
    alone = sum(seconds(1).values())
    print(table(found, alone, machine.per_node))
    print('\n'.join(what_breaks_first(job, machine, found, args)))
    return 0


def table(found: Mapping[int, Mapping[str, float]], alone: float, per_node: int) -> str:
    """A number of nodes a line: seconds of a step, efficiency, and the parts in milliseconds."""
    names = list(next(iter(found.values())))
    lines = [
        f'| nodes | GPUs | step s | efficiency | {" | ".join(f"{name} ms" for name in names)} |',
        f'| --- | --- | --- | --- |{" --- |" * len(names)}',
    ]
    for nodes, parts in found.items():
        whole = sum(parts.values())
        cells = ' | '.join(f'{1e3 * parts[name]:.1f}' for name in names)
        lines.append(
            f'| {nodes} | {nodes * per_node} | {whole:.2f} | {alone / whole:.1%} | {cells} |'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    raise SystemExit(main())
