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
from collections.abc import Mapping, Sequence
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
        direction: Of GRPO: the direction whose reward is varied, and shuffled in the control;
            ``None`` = there is no reward.
        noise: Standard deviation of the noise on the last layer of ``text_hidden_fcs`` that the
            start has, in standard deviations of its weights.
        captions: Whether the training data has reference captions.
    """

    config: str
    shows: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    direction: str | None = None
    noise: float = 0.0
    captions: bool = False


def _reward(kind: str, **options: Any) -> dict[str, Any]:
    return dict(type=f'projects.llava_sam2_rl.rewards.{kind}', **options)


_METEOR = _reward('MeteorReward')
_LIKELIHOOD = _reward('CaptionLikelihoodReward')
_TELLS_APART = _reward('CaptionLikelihoodReward', contrast='other_region')
_IOU = _reward('MaskIoUReward')

#: Rewards by direction and name, for ``--rewards``.
REWARDS: dict[str, dict[str, dict[str, Any]]] = {
    'mask_to_caption': {
        'iou': _IOU,
        'iou+likelihood': _reward(
            'WeightedRewards',
            rewards=[{**_IOU, 'weight': 0.75}, {**_TELLS_APART, 'weight': 0.25}],
        ),
    },
    'caption_to_mask': {
        'meteor': _METEOR,
        'likelihood': _LIKELIHOOD,
        'likelihood-sum': _reward('CaptionLikelihoodReward', reduction='sum', contrast='no_mask'),
        'likelihood+meteor': _reward(
            'WeightedRewards',
            rewards=[{**_LIKELIHOOD, 'weight': 0.5}, {**_METEOR, 'weight': 0.5}],
        ),
    },
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
        direction='mask_to_caption',
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
        direction='caption_to_mask',
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
#: Stands for the reward that the config has.
OWN = 'real'
NUMBERS = (
    'return_iou',
    'own_iou',
    'listening_gap',
    'caption_reward',
    'meteor',
    'attribute_recall',
    'wrong_attributes',
)


@dataclass(frozen=True)
class Job:
    """One run of an experiment.

    Args:
        name: Of the experiment.
        seed: Of the run.
        reward: `OWN`, or a name of `REWARDS`.
        control: Whether the reward's scores are shuffled.
    """

    name: str
    seed: int
    reward: str
    control: bool

    @property
    def label(self) -> str:
        """What the table calls the reward."""
        if not self.control:
            return self.reward
        return 'shuffled' if self.reward == OWN else f'{self.reward}, shuffled'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py learn``."""
    parser.add_argument(
        '--only', nargs='+', choices=list(EXPERIMENTS), default=list(EXPERIMENTS), metavar='NAME',
        help=f'experiments to run, of {", ".join(EXPERIMENTS)} (default: all)',
    )  # fmt: skip
    names = sorted({name for found in REWARDS.values() for name in found})
    parser.add_argument(
        '--rewards', nargs='+', choices=[OWN, *names], default=[OWN], metavar='NAME',
        help=f"rewards of the GRPO experiments whose direction has them: {OWN} (the config's own), "
        f'{", ".join(names)} (default: {OWN})',
    )  # fmt: skip
    parser.add_argument(
        '--no-control', action='store_true', help='only the real runs, none on shuffled rewards'
    )
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
        Job(name, seed, reward, control)
        for name in args.only
        for reward in rewards_of(EXPERIMENTS[name], args.rewards)
        for seed in args.seeds
        for control in (False, True)
        if not control or (EXPERIMENTS[name].direction is not None and not args.no_control)
    ]
    # Configs are read here: mmengine's lazy import is not made for threads.
    paths = [write_config(job, starts[job.name][0], args) for job in jobs]
    cores = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    rows = []
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(train, path, job.seed, cores) for path, job in zip(paths, jobs)]
        for path, job, done in zip(paths, jobs, runs, strict=True):
            row = _row(job, starts[job.name][1], path, done.result(), args.regions)
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


def rewards_of(experiment: Experiment, names: Sequence[str]) -> list[str]:
    """Those of the rewards that an experiment's direction has; its own where there is none."""
    known = {OWN, *REWARDS.get(experiment.direction or '', ())}
    return [name for name in names if name in known] or [OWN]


def reward_config(config: Any, job: Job) -> dict[str, Any]:
    """The reward of a run: the config's own or a named one, shuffled in the control."""
    direction = EXPERIMENTS[job.name].direction
    if job.reward == OWN:
        reward = config.model.objective[direction].reward.to_dict()
    else:
        reward = REWARDS[direction][job.reward]
    return _reward('PermutedReward', reward=reward) if job.control else reward


def write_config(job: Job, start: str, args: argparse.Namespace) -> Path:
    """The config of one run, in a folder of its own."""
    from mmengine.config import Config

    experiment = EXPERIMENTS[job.name]
    config = Config.fromfile(ROOT / 'configs' / experiment.config)
    config.merge_from_dict({**experiment.options, 'model.policy.pretrained': start})
    if experiment.direction is not None and (job.control or job.reward != OWN):
        # Replaced, not merged into the reward that is there.
        reward = {**reward_config(config, job), '_delete_': True}
        config.merge_from_dict({f'model.objective.{experiment.direction}': {'reward': reward}})
    if args.iters:
        config.train_cfg.max_iters = args.iters
    length = config.train_cfg.get('max_iters') or config.train_cfg.default_length.max_iters
    for dataset in config.train_dataloader.dataset.datasets:
        dataset.withhold_captions = not experiment.captions
    config.default_hooks.checkpoint.interval = length
    # The start has been measured, once for all runs.
    config.default_hooks.report.validate_first = False
    kind = 'control' if job.control else 'run'
    kind = kind if job.reward == OWN else f'{job.reward}_{kind}'
    folder = args.work_dir / job.name.replace('/', '_') / f'{kind}_{job.seed}'
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
    job: Job,
    before: dict[str, float],
    path: Path,
    seconds: float,
    regions: int,
) -> dict[str, Any]:
    from mmengine.config import Config
    from mmengine.logging import MMLogger
    from mmengine.runner import load_checkpoint

    from projects.llava_sam2_rl.registry import MODELS

    experiment, folder = EXPERIMENTS[job.name], path.parent
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
        'experiment': job.name,
        'reward': '' if experiment.direction is None else job.label,
        'seed': job.seed,
        'training s': round(seconds),
        'zero-variance groups': _mean_of_log(folder, experiment, 'frac_reward_zero_std'),
    }
    for key in NUMBERS:
        text = f'{before[key]:.3f} → {after[key]:.3f} ({after[key] - before[key]:+.3f})'
        row[key] = f'**{text}**' if key in experiment.shows else text
    return row


def _mean_of_log(folder: Path, experiment: Experiment, key: str) -> str:
    """Mean of a logged number over the last run in a folder; empty where it was not logged."""
    from projects.llava_sam2_rl.models.objectives.base import LOG_PREFIX
    from projects.llava_sam2_rl.report.logs import read_scalars

    if experiment.direction is None:
        return ''
    curve = read_scalars(folder).curve(f'{LOG_PREFIX[experiment.direction]}/{key}')
    return f'{sum(value for _, value in curve) / len(curve):.2f}' if curve else ''
