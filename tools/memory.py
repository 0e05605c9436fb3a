"""What a GRPO config needs of a GPU's memory, by parts; and one real step that checks it.

Sizes come from the config: the model is built without weights. With --measure it is built with
random ones on this machine, takes one step, and the table says what that took beside what was
predicted; under ZeRO-3 in as many processes as there are GPUs. On a CPU the measured number is
resident memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Of the table: configs without what all of their names end in, GB of a card, numbers of ranks.
MODELS = (
    'sa2va_1b',
    'sa2va_internvl3_2b',
    'sa2va_4b',
    'sa2va_8b',
    'sa2va_internvl3_8b',
    'sa2va_internvl3_14b',
    'sa2va_26b',
)
CARDS = (24, 40, 80)
GPUS = (1, 8, 16, 64)
#: Ways to train by what they need, the simplest first: name, stage of ZeRO.
STAGES = (('DDP', 0), ('ZeRO-2', 2), ('ZeRO-3', 3))
#: G, the first that fits with B 1.
GROUPS = (8, 4, 2)
EXAMPLES = """\
examples:
  python tools/memory.py configs/sa2va_4b_dual_loop.py --gpus 8 --zero 2
  python tools/memory.py configs/sa2va_4b_dual_loop.py --batch 1 --group 2 --tokens 32 --measure
  python tools/memory.py configs/sa2va_tiny_dual_loop.py --gpus 2 --zero 3 --measure
  python tools/memory.py --table
"""


def table(rows: dict[str, int]) -> str:
    """One part a line, in GB."""
    width = max(map(len, rows))
    lines = [f'  {name:<{width}}  {value / 1e9:7.2f} GB' for name, value in rows.items()]
    return '\n'.join([*lines, f'  {"in all":<{width}}  {sum(rows.values()) / 1e9:7.2f} GB'])


def way_to_decode(sizes: Any, gpus: int) -> str:
    """One line: from which card on a run under ZeRO-3 puts the language model together."""
    from projects.llava_sam2_rl.preflight.memory import MARGIN, predict_rollout

    needed = sum(predict_rollout(sizes, gpus).values())
    return (
        f'rollouts with the language model put together take {needed / 1e9:.2f} GB: '
        f'gather_for_rollout is chosen where a GPU has {(needed + MARGIN) / 1e9:.2f} GB or more, '
        'else each token gathers layer by layer'
    )


def cell(sizes: Any, room: float, gpus: int) -> str:
    """The simplest way to train that has room for 8 rollouts a rank, else the roomiest one.

    Args:
        sizes: Of a config; its ``batch`` and ``group`` are of no account.
        room: Bytes on each GPU.
        gpus: W, ranks.

    Returns:
        The way and the largest B · G of a rank, or ``–``.
    """
    ways = STAGES if gpus > 1 else (('one process', 0),)
    found = {name: largest(sizes, room, gpus, zero) for name, zero in ways}
    chosen = next((x for x in found if found[x] >= GROUPS[0]), max(found, key=found.__getitem__))
    return f'{chosen}, {found[chosen]}' if found[chosen] else '–'


def largest(sizes: Any, room: float, gpus: int, zero: int) -> int:
    """The largest B · G that one way has room for, 0 where that is none of `GROUPS`."""
    from projects.llava_sam2_rl.preflight.memory import predict

    def fits(batch: int, group: int) -> bool:
        tried = replace(sizes, batch=batch, group=group)
        return sum(predict(tried, gpus, zero).values()) <= room

    group = next((group for group in GROUPS if fits(1, group)), 0)
    batch = 1
    while group and fits(batch + 1, group):
        batch += 1
    return batch * group


def overview(names: Sequence[str]) -> str:
    """What fits on which cards, as a Markdown table: a model and a card a line."""
    from mmengine.config import Config

    from projects.llava_sam2_rl.preflight.memory import MARGIN, read_sizes

    lines = [
        f'| model | GPU | {" | ".join(f"{count} GPU(s)" for count in GPUS)} |',
        f'| --- | --- |{" --- |" * len(GPUS)}',
    ]
    for name in names:
        sizes = read_sizes(Config.fromfile(ROOT / f'configs/{name}_dual_loop.py'))
        for card in CARDS:
            cells = [cell(sizes, card * 1e9 - MARGIN, count) for count in GPUS]
            lines.append(f'| `{name}` | {card} GB | {" | ".join(cells)} |')
    return '\n'.join(lines)


def measure(config: Any, sizes: Any) -> dict[str, tuple[float, int]]:
    """Two steps with random weights; the optimizer's moments are there in the second.

    Returns:
        Seconds in the second step, and the peak in bytes above what the process held before the
        model was built, by phase.
    """
    import psutil
    import torch
    from mmengine.optim import OptimWrapper

    sys.path.insert(0, str(ROOT / 'tools'))
    from benchmarks import common

    from projects.llava_sam2_rl.engine.timing import phases
    from projects.llava_sam2_rl.registry import MODELS

    class Autocast(OptimWrapper):
        """mmengine's `AmpOptimWrapper` asks for a GPU; this is its bfloat16 on any device."""

        @contextmanager
        def optim_context(self, model: Any) -> Iterator[None]:
            enabled = sizes.autocast
            with (
                super().optim_context(model),
                torch.autocast(device, torch.bfloat16, enabled=enabled),
            ):
                yield

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    process = psutil.Process()
    if device == 'cpu':
        common.give_freed_memory_back()

    def held() -> int:
        return torch.cuda.memory_allocated() if device == 'cuda' else process.memory_info().rss

    options = common.with_random_weights(config.model, sizes.group, sizes.tokens)
    before = held()
    with torch.device(device):
        model = MODELS.build(options)
    batch = common.make_batch(model, sizes.batch, device)
    optimizer = torch.optim.AdamW(
        [p for p in model.policy.parameters() if p.requires_grad], lr=1e-5
    )
    wrapper = Autocast(optimizer)
    model.train()
    with common.peaks_by_phase(lambda: held() - before) as peaks:
        for _ in range(2):
            phases.take()
            started = time.perf_counter()
            model.train_step(batch, wrapper)
            with phases.phase('teacher'):
                model.update_teacher()
            seconds = time.perf_counter() - started
            print(f'a step took {seconds:.0f} s', file=sys.stderr, flush=True)
    spent = phases.take()
    # A phase that was over between two looks has a time, and no peak of its own.
    return {
        name: (spent[name].seconds if name in spent else 0.0, peaks.get(name, 0))
        for name in dict.fromkeys([*spent, *peaks])
    }


def print_split(config: Path, ranks: int, sizes: Any, expected: int) -> None:
    """Measures one step of W ranks and prints what each took beside the prediction."""
    sys.path.insert(0, str(ROOT / 'tools'))
    from benchmarks import split_step

    for rank, found in enumerate(split_step.measure(config, ranks, sizes)):
        print(f'rank {rank}: holds {found["resident"] / 1e9:.2f} GB of weights between steps')
        print('phase                 s   peak GB')
        for name in dict.fromkeys([*found['seconds'], *found['peaks']]):
            seconds, peak = found['seconds'].get(name, 0.0), found['peaks'].get(name, 0)
            print(f'  {name:<14} {seconds:7.1f}   {peak / 1e9:7.2f}')
        peak = max(found['peaks'].values())
        print(
            f'measured {peak / 1e9:.2f} GB, predicted {expected / 1e9:.2f} GB '
            f'({expected / peak - 1:+.0%})'
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', nargs='?', help='config file')
    parser.add_argument(
        '--table',
        action='store_true',
        help='which published model fits on which cards, by which stage, with the largest B·G',
    )
    parser.add_argument('--gpus', type=int, default=1, help='ranks (default: 1)')
    parser.add_argument(
        '--zero', type=int, choices=[0, 1, 2, 3], default=0, help='0: DDP (default)'
    )
    parser.add_argument('--batch', type=int, help="samples per rank (default: the config's)")
    parser.add_argument('--group', type=int, help="G, rollouts (default: the config's)")
    parser.add_argument('--tokens', type=int, help="longest caption (default: the config's)")
    parser.add_argument('--measure', action='store_true', help='take real steps and compare')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the tables."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.table:
        print(overview(MODELS))
        return 0
    if args.config is None:
        parser.error('name a config, or ask for the --table')
    if not Path(args.config).is_file():
        parser.error(f'there is no config {args.config}')
    from mmengine.config import Config

    from projects.llava_sam2_rl.preflight.memory import predict, read_sizes

    config = Config.fromfile(args.config)
    sizes = read_sizes(config, args.batch, args.group, args.tokens)
    parts = predict(sizes, args.gpus, args.zero)
    print(
        f'B {sizes.batch}, G {sizes.group}, {sizes.tokens} tokens, {args.gpus} GPU(s), '
        f'{f"ZeRO-{args.zero}" if args.zero else "DDP"}; '
        f'{sizes.frozen / 1e6:,.0f} M parameters frozen, {sizes.trained / 1e6:,.0f} M trained'
    )
    print(table(parts))
    if args.zero == 3:
        print(way_to_decode(sizes, args.gpus))
    if args.measure and args.gpus > 1:
        if args.zero != 3:
            parser.error('several ranks are measured under --zero 3')
        print_split(Path(args.config), args.gpus, sizes, sum(parts.values()))
    elif args.measure:
        found = measure(config, sizes)
        print('phase                 s   peak GB')
        for name, (seconds, peak) in found.items():
            print(f'  {name:<14} {seconds:7.1f}   {peak / 1e9:7.2f}')
        peak, expected = max(peak for _, peak in found.values()), sum(parts.values())
        print(
            f'measured {peak / 1e9:.2f} GB, predicted {expected / 1e9:.2f} GB '
            f'({expected / peak - 1:+.0%})'
        )
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
