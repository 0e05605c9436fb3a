"""What a GRPO config needs of a GPU's memory, by parts; and one real step that checks it.

Sizes come from the config: the model is built without weights. With --measure it is built with
random ones on this machine, takes one step, and the table says what that took beside what was
predicted. On a CPU the measured number is resident memory.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_M_MMAP_THRESHOLD = -3
EXAMPLES = """\
examples:
  python tools/memory.py configs/sa2va_4b_dual_loop.py --gpus 8 --zero 2
  python tools/memory.py configs/sa2va_4b_dual_loop.py --batch 1 --group 2 --tokens 32 --measure
"""


def table(rows: dict[str, int]) -> str:
    """One part a line, in GB."""
    width = max(map(len, rows))
    lines = [f'  {name:<{width}}  {value / 1e9:7.2f} GB' for name, value in rows.items()]
    return '\n'.join([*lines, f'  {"in all":<{width}}  {sum(rows.values()) / 1e9:7.2f} GB'])


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
    from benchmarks.common import make_batch

    from projects.llava_sam2_rl.engine.timing import phases
    from projects.llava_sam2_rl.preflight.memory import random_weights
    from projects.llava_sam2_rl.registry import MODELS
    from projects.llava_sam2_rl.rewards import MeteorReward

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
    if device == 'cpu' and sys.platform == 'linux':
        # What is freed goes back to the system at once; glibc keeps blocks below 32 MB otherwise.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)

    def held() -> int:
        return torch.cuda.memory_allocated() if device == 'cuda' else process.memory_info().rss

    before = held()
    options = config.model
    options.policy = random_weights(options.policy)
    options.max_new_tokens = sizes.tokens
    if 'num_generations' in options.objective:
        options.objective.num_generations = sizes.group
        # No judge is asked.
        options.objective.caption_to_mask.reward = MeteorReward()
    with torch.device(device):
        model = MODELS.build(options)
    batch = make_batch(model, sizes.batch, device)
    optimizer = torch.optim.AdamW(
        [p for p in model.policy.parameters() if p.requires_grad], lr=1e-5
    )
    wrapper = Autocast(optimizer)
    peaks: dict[str, int] = defaultdict(int)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            name = phases.current or 'between'
            peaks[name] = max(peaks[name], held() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    model.train()
    for _ in range(2):
        phases.take()
        started = time.perf_counter()
        model.train_step(batch, wrapper)
        with phases.phase('teacher'):
            model.update_teacher()
        print(f'a step took {time.perf_counter() - started:.0f} s', file=sys.stderr, flush=True)
    done.set()
    watcher.join()
    spent = phases.take()
    # A phase that was over between two looks has a time, and no peak of its own.
    return {
        name: (spent[name].seconds if name in spent else 0.0, peaks.get(name, 0))
        for name in dict.fromkeys([*spent, *peaks])
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
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
    args = build_parser().parse_args(argv)
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
    if args.measure:
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
