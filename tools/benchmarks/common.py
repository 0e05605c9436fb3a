"""What the benchmarks of whole steps share: models, batches, timing by turns, peaks of memory."""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
#: What is measured; the last where there is a GPU alone.
MODELS = ('tiny', '100m', '4b')
#: How often memory is looked at, in seconds.
_INTERVAL = 0.02
_M_MMAP_THRESHOLD = -3


class Skipped(Exception):
    """What is to be compared with is not there; the message says what would bring it."""


def add_arguments(
    parser: argparse.ArgumentParser, batch: int | None = None, rounds: int = 3
) -> None:
    """The options that all of them take."""
    parser.add_argument(
        '--models',
        nargs='+',
        choices=MODELS,
        default=['tiny', '100m', '4b'] if torch.cuda.is_available() else ['tiny', '100m'],
        help='4b: random weights in bf16, GPU only (default: %(default)s)',
    )
    parser.add_argument(
        '--batch',
        type=int,
        default=batch,
        help=f'B, samples (default: {batch or "8 of the tiny model, as its config, 2 of others"})',
    )
    parser.add_argument(
        '--tokens', type=int, help="longest caption (default: the model's, 32 or 128)"
    )
    parser.add_argument('--rounds', type=int, default=rounds, help='timed rounds (%(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')


def batch_size(model: str, args: argparse.Namespace) -> int:
    """B: what was asked for, or what fits the model."""
    return args.batch or (8 if model == 'tiny' else 2)


def build_model(size: str, objective: Any, args: argparse.Namespace, **options: Any) -> Any:
    """A `DualLoopModel` around one of `MODELS`, without dropout; alike at every call.

    Args:
        size: Of `MODELS`.
        objective: What it trains by.
        args: Of the command line.
        **options: Of `DualLoopModel`, in place of the config's.
    """
    from mmengine.config import Config

    from projects.llava_sam2_rl import registry
    from projects.llava_sam2_rl.utils.pretrained import SA2VA_4B, complete_sizes

    config = Config.fromfile(ROOT / f'configs/_base_/models/sa2va_{size}.py').model
    config.policy.lora.lora_dropout = 0.0
    if size == '4b':
        tiny = Config.fromfile(ROOT / 'configs/_base_/models/sa2va_100m.py').model.policy
        # Random weights of that size: what is measured does not depend on their values.
        sizes = complete_sizes(SA2VA_4B, {})
        config.policy.update(sizes, pretrained=None, tokenizer=tiny.tokenizer)
    config.update(objective=objective, **options)
    if args.tokens:
        config.max_new_tokens = args.tokens
    torch.manual_seed(0)
    with torch.device(args.device if size == '4b' else 'cpu'):
        model = registry.MODELS.build(config)
    return model.to(args.device)


def with_random_weights(model: Any, group: int, tokens: int) -> Any:
    """A `DualLoopModel`'s config, changed to be measured without checkpoint and judge.

    Args:
        model: Changed in place.
        group: G, of the objectives that have a group.
        tokens: Longest caption.
    """
    from projects.llava_sam2_rl.preflight.memory import random_weights
    from projects.llava_sam2_rl.rewards import MeteorReward

    model.policy = random_weights(model.policy)
    model.max_new_tokens = tokens
    if 'num_generations' in model.objective:
        model.objective.num_generations = group
        direction = model.objective.get('caption_to_mask', {})
        model.objective.caption_to_mask = {**direction, 'reward': dict(type=MeteorReward)}
    return model


def make_batch(model: Any, count: int, device: str = 'cpu', start: int = 0) -> dict[str, Any]:
    """``count`` generated scenes as the data loader gives them, at the model's sizes."""
    from projects.llava_sam2_rl.datasets import GeneratedScenes, Sa2VATransform, sa2va_collate
    from projects.llava_sam2_rl.utils.pretrained import image_sizes

    transform = Sa2VATransform(**image_sizes(model.policy.config))
    scenes = GeneratedScenes(length=start + count, split='val', transforms=transform)
    batch = sa2va_collate([scenes[i] for i in range(start, start + count)])
    return model.data_preprocessor.to(device).cast_data(batch)


def in_turns(
    ways: Mapping[str, Callable[[], Any]], rounds: int, device: str = 'cpu', warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each after a warm-up; turns, so that a busy moment hits all alike.

    Every way starts a round from the same state of the random generator.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm_up + rounds):
        for name, way in ways.items():
            torch.manual_seed(turn)
            wait(device)
            started = time.perf_counter()
            way()
            wait(device)
            if turn >= warm_up:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def wait(device: str | torch.device) -> None:
    """Until the GPU has done what it was asked."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def give_freed_memory_back() -> None:
    """What is freed goes back to the system at once; glibc keeps blocks below 32 MB otherwise."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)


@contextmanager
def peaks_by_phase(held: Callable[[], int]) -> Iterator[dict[str, int]]:
    """The most bytes that were held in each phase of `engine.timing` so far.

    Args:
        held: Bytes that are held now.
    """
    from projects.llava_sam2_rl.engine.timing import phases

    peaks: dict[str, int] = defaultdict(int)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL):
            name = phases.current or 'between'
            peaks[name] = max(peaks[name], held())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()
