"""Does it learn, and because of its reward? Held-out numbers before and after, with a control.

Each experiment trains the tiny Sa2VA with `tools/train.py` from the same start with several seeds.
Its control is the same run with the reward's scores shuffled inside each group (GRPO): what it
gains as well was not learnt from the reward.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Experiment:
    """One comparison.

    Args:
        config: File below configs/.
        shows: Held-out numbers that should rise.
        options: What differs from the config.
        control: What differs in the control run on top of it; ``None`` = no control.
        noise: Standard deviation of the noise on the last layer of ``text_hidden_fcs`` that the
            start has, in standard deviations of its weights.
        captions: Whether the training data has reference captions.
    """

    config: str
    shows: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    control: Mapping[str, Any] | None = None
    noise: float = 0.0
    captions: bool = False


def _permuted(direction: str, reward: str) -> dict[str, Any]:
    package = 'projects.llava_sam2_rl.rewards'
    return {
        f'model.objective.{direction}.reward': dict(
            type=f'{package}.PermutedReward', reward=dict(type=f'{package}.{reward}')
        )
    }


EXPERIMENTS = {
    'grpo/mask_to_caption': Experiment(
        'sa2va_tiny_dual_loop.py',
        ('return_iou',),
        {
            'model.caption_to_mask.weight': 0,
            'train_cfg.max_iters': 120,
            'param_scheduler.warmup_ratio': 20 / 120,
        },
        control=_permuted('mask_to_caption', 'MaskIoUReward'),
    ),
    # The tiny checkpoint finds nearly everything that a caption of its own kind names (the best of
    # eight actions is hardly better than the mean), so that there is nothing left to learn. This
    # one starts from a damaged ear, which alone is trained: captions stay what they were.
    'grpo/caption_to_mask': Experiment(
        'sa2va_tiny_dual_loop.py',
        ('own_iou', 'caption_reward'),
        {
            'model.mask_to_caption.weight': 0,
            'model.objective.caption_to_mask.aux_mask_weight': 0,
            'model.policy.trainable': ['text_hidden_fcs'],
            'optim_wrapper.optimizer.lr': 1e-3,
        },
        control=_permuted('caption_to_mask', 'MeteorReward'),
        noise=5.0,
        captions=True,
    ),
    # The other objectives, with as many steps, from the same start, without reference captions.
    'gumbel/mask_to_caption': Experiment(
        'sa2va_tiny_dual_loop_gumbel.py',
        ('return_iou',),
        {
            'model.caption_to_mask.weight': 0,
            'train_cfg.max_iters': 120,
            'param_scheduler.warmup_ratio': 20 / 120,
        },
    ),
    'sft/mask_to_caption': Experiment(
        'sa2va_tiny_dual_loop_sft.py',
        ('return_iou',),
        {
            'model.caption_to_mask.weight': 0,
            'train_cfg.max_iters': 120,
            'param_scheduler.warmup_ratio': 20 / 120,
        },
    ),
}
NUMBERS = ('return_iou', 'own_iou', 'listening_gap', 'caption_reward', 'meteor')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py learn``."""
    parser.add_argument(
        '--only', nargs='+', choices=list(EXPERIMENTS), default=list(EXPERIMENTS), metavar='NAME',
        help=f'experiments to run, of {", ".join(EXPERIMENTS)} (default: all)',
    )  # fmt: skip
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--regions', type=int, default=256, help='held-out regions (default: 256)')
    parser.add_argument('--iters', type=int, help='overrides the length of every run')
    parser.add_argument(
        '--jobs', type=int, default=1,
        help='runs side by side; each has its share of the cores (default: 1)',
    )  # fmt: skip
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/benchmark_learn'))


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains and evaluates everything.

    Returns:
        A row per experiment, seed, and real run or control: its gains in held-out numbers.
    """
    args.work_dir.mkdir(parents=True, exist_ok=True)
    starts = {name: prepare(EXPERIMENTS[name], args) for name in args.only}
    jobs = [
        (name, seed, control)
        for name in args.only
        for seed in args.seeds
        for control in (False, True)
        if not control or EXPERIMENTS[name].control is not None
    ]
    # Configs are read here: mmengine's lazy import is not made for threads.
    paths = [write_config(*job, starts[job[0]][0], args) for job in jobs]
    cores = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    rows = []
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(train, path, job[1], cores) for path, job in zip(paths, jobs)]
        for path, job, done in zip(paths, jobs, runs, strict=True):
            row = _row(*job, starts[job[0]][1], path, done.result(), args.regions)
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def prepare(experiment: Experiment, args: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """The folder of the model that the runs start from, and its held-out numbers."""
    import torch
    from mmengine.config import Config

    from projects.llava_sam2_rl.registry import MODELS

    config = Config.fromfile(ROOT / 'configs' / experiment.config)
    folder = config.model.policy.pretrained
    model = MODELS.build(config.model)
    if experiment.noise:
        weight = model.policy.text_hidden_fcs[2].weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        weight.data += experiment.noise * weight.data.std() * noise
        folder = str((args.work_dir / f'start_noise_{experiment.noise:g}').resolve())
        model.policy.save_pretrained(folder)
    return folder, evaluate(model, config, args.regions)


def evaluate(model: Any, config: Any, regions: int) -> dict[str, float]:
    """The cycle metric on the first held-out regions of the config's validation set."""
    from projects.llava_sam2_rl.engine.dataloader_config import complete_dataloader
    from projects.llava_sam2_rl.evaluation import evaluate_cycle
    from projects.llava_sam2_rl.registry import DATASETS

    val = complete_dataloader(config.val_dataloader, config)
    held_out = DATASETS.build({**val.dataset, 'length': regions})
    return evaluate_cycle(model, held_out)[0]


def write_config(name: str, seed: int, control: bool, start: str, args: argparse.Namespace) -> Path:
    """The config of one run, in a folder of its own."""
    from mmengine.config import Config

    experiment = EXPERIMENTS[name]
    config = Config.fromfile(ROOT / 'configs' / experiment.config)
    config.merge_from_dict({**experiment.options, 'model.policy.pretrained': start})
    if control:
        for key, value in (experiment.control or {}).items():
            # Replaced, not merged into the reward that is there.
            parent, last = key.rsplit('.', 1)
            config.merge_from_dict({parent: {last: {**value, '_delete_': True}}})
    if args.iters:
        config.train_cfg.max_iters = args.iters
    length = config.train_cfg.get('max_iters') or config.train_cfg.default_length.max_iters
    for dataset in config.train_dataloader.dataset.datasets:
        dataset.withhold_captions = not experiment.captions
    config.default_hooks.checkpoint.interval = length
    folder = args.work_dir / name.replace('/', '_') / f'{"control" if control else "run"}_{seed}'
    folder.mkdir(parents=True, exist_ok=True)
    config.dump(folder / 'config.py')
    return folder / 'config.py'


def train(path: Path, seed: int, cores: int) -> float:
    """One run in a process of its own; returns its seconds."""
    folder = path.parent
    (folder / 'last_checkpoint').unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(path)]
    command += ['--work-dir', str(folder), '--seed', str(seed)]
    started = time.time()
    with (folder / 'console.log').open('w', encoding='utf-8') as log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': str(cores)},
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f'{" ".join(command)} failed, see {folder / "console.log"}')
    return time.time() - started


def _row(
    name: str,
    seed: int,
    control: bool,
    before: dict[str, float],
    path: Path,
    seconds: float,
    regions: int,
) -> dict[str, Any]:
    from mmengine.config import Config
    from mmengine.logging import MMLogger
    from mmengine.runner import load_checkpoint

    from projects.llava_sam2_rl.registry import MODELS

    experiment, folder = EXPERIMENTS[name], path.parent
    config = Config.fromfile(path)
    model = MODELS.build(config.model)
    load_checkpoint(
        model,
        (folder / 'last_checkpoint').read_text(encoding='utf-8').strip(),
        map_location='cpu',
        logger=MMLogger.get_instance('benchmark', log_level='WARNING'),
    )
    after = evaluate(model, config, regions)
    (folder / 'held_out.json').write_text(json.dumps(after, indent=2) + '\n', encoding='utf-8')
    row: dict[str, Any] = {
        'experiment': name,
        'reward': '' if experiment.control is None else 'shuffled' if control else 'real',
        'seed': seed,
        'training s': round(seconds),
    }
    for key in NUMBERS:
        text = f'{before[key]:.3f} → {after[key]:.3f} ({after[key] - before[key]:+.3f})'
        row[key] = f'**{text}**' if key in experiment.shows else text
    return row
