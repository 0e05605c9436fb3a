"""Does it learn, and because of its reward? Held-out numbers before and after, with a control.

A matrix: experiments (objective and direction) x rewards x reductions x worlds x seeds. Each run
trains the tiny Sa2VA with `tools/train.py` from the same start. Its control is the same run with
the reward's scores shuffled inside each group (GRPO): what it gains as well was not learnt from the
reward. Held-out curves of all runs, with the spread of their seeds, are drawn as well.
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
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLOT = ROOT / 'docs/images/learning.png'


@dataclass(frozen=True)
class Experiment:
    """One comparison.

    Args:
        config: File below configs/.
        shows: Held-out numbers that should rise.
        options: What differs from the config.
        direction: Of GRPO: the direction whose reward is varied, and shuffled in the control;
            ``None`` = there is no control.
        noise: Standard deviation of the noise on the last layer of ``text_hidden_fcs`` that the
            start has, in standard deviations of its weights.
        captions: Whether the training data has reference captions.
        own_world: Whether it keeps to its config's sources, whatever ``--worlds`` says.
    """

    config: str
    shows: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    direction: str | None = None
    noise: float = 0.0
    captions: bool = False
    own_world: bool = False


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


_GRPO = 'sa2va_tiny_dual_loop.py'
_CLIPS = 'sa2va_tiny_dual_loop_clips.py'
_SHORT: dict[str, Any] = {'train_cfg.max_iters': 120, 'param_scheduler.warmup_ratio': 20 / 120}
_CAPTIONING_ALONE: dict[str, Any] = {'model.caption_to_mask.weight': 0, **_SHORT}
#: The policy gradient alone: what is learnt, the reward has taught.
_NO_MASK_LOSS: dict[str, Any] = {'model.objective.caption_to_mask.aux_mask_weight': 0}
_SEGMENTING_ALONE: dict[str, Any] = {'model.mask_to_caption.weight': 0, **_NO_MASK_LOSS}

#: By ``objective/direction``.
EXPERIMENTS = {
    'grpo/mask_to_caption': Experiment(
        _GRPO, ('return_iou',), _CAPTIONING_ALONE, direction='mask_to_caption'
    ),
    'grpo/caption_to_mask': Experiment(
        _GRPO, ('own_iou',), _SEGMENTING_ALONE, direction='caption_to_mask', captions=True
    ),
    'grpo/both': Experiment(_GRPO, ('return_iou', 'own_iou'), _NO_MASK_LOSS, captions=True),
    # Noise on the layer behind [SEG], which alone is trained: captions stay what they were.
    'grpo/damaged_ear': Experiment(
        _GRPO,
        ('own_iou', 'caption_reward'),
        {
            **_SEGMENTING_ALONE,
            'model.policy.trainable': ['text_hidden_fcs'],
            'optim_wrapper.optimizer.lr': 1e-3,
        },
        direction='caption_to_mask',
        noise=5.0,
        captions=True,
    ),
    # A caption of a clip's first frame, rewarded by its mask in all frames or by one later frame.
    'grpo/clips_propagated': Experiment(
        _CLIPS,
        ('return_j',),
        _CAPTIONING_ALONE,
        direction='mask_to_caption',
        own_world=True,
    ),
    'grpo/clips_later_frame': Experiment(
        _CLIPS,
        ('return_j',),
        {**_CAPTIONING_ALONE, 'model.objective.mask_to_caption.return_trip': 'later_frame'},
        direction='mask_to_caption',
        own_world=True,
    ),
    # The other objectives, with as many steps, from the same start, without reference captions.
    'gumbel/mask_to_caption': Experiment(
        'sa2va_tiny_dual_loop_gumbel.py', ('return_iou',), _CAPTIONING_ALONE
    ),
    'sft/mask_to_caption': Experiment(
        'sa2va_tiny_dual_loop_sft.py', ('return_iou',), _CAPTIONING_ALONE
    ),
}
#: What runs where nothing is asked for: the experiments on images.
DEFAULT = [name for name, experiment in EXPERIMENTS.items() if not experiment.own_world]
#: Stands for what the config has.
OWN = 'real'
REDUCTIONS = ('grpo', 'bnpo', 'dr_grpo', 'dapo')
#: Class of the sources that a world keeps; ``both`` is the config's.
WORLDS = {'both': None, 'scenes': 'GeneratedScenes', 'collages': 'GeneratedCollages'}
NUMBERS = (
    'return_iou',
    'return_j',
    'own_iou',
    'listening_gap',
    'caption_reward',
    'meteor',
    'attribute_recall',
    'wrong_attributes',
)
#: Held-out regions of the curves, and how many validations a run has.
CURVE_REGIONS, CURVE_POINTS = 64, 6


@dataclass(frozen=True)
class Job:
    """One run of an experiment.

    Args:
        name: Of the experiment.
        seed: Of the run.
        reward: `OWN`, or a name of `REWARDS`.
        control: Whether the reward's scores are shuffled.
        reduction: `OWN`, or one of `REDUCTIONS`.
        world: Of `WORLDS`.
    """

    name: str
    seed: int
    reward: str
    control: bool
    reduction: str = OWN
    world: str = 'both'

    @property
    def label(self) -> str:
        """What the table calls the reward."""
        if not self.control:
            return self.reward
        return 'shuffled' if self.reward == OWN else f'{self.reward}, shuffled'

    @property
    def series(self) -> tuple[str, str, str, str]:
        """What the runs of several seeds have in common: experiment, reward, reduction, world."""
        return self.name, self.label, self.reduction, self.world

    @property
    def folder(self) -> str:
        """Of the run, below the working directory."""
        kind = 'control' if self.control else 'run'
        parts = [x for x in (self.reward, self.reduction) if x != OWN]
        parts += [self.world] if self.world != 'both' else []
        return f'{self.name.replace("/", "_")}/{"_".join([*parts, kind])}_{self.seed}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py learn``."""
    parser.add_argument(
        '--only', nargs='+', choices=list(EXPERIMENTS), default=DEFAULT, metavar='NAME',
        help=f'experiments to run, of {", ".join(EXPERIMENTS)} (default: those without clips)',
    )  # fmt: skip
    names = sorted({name for found in REWARDS.values() for name in found})
    parser.add_argument(
        '--rewards', nargs='+', choices=[OWN, *names], default=[OWN], metavar='NAME',
        help=f"rewards of the GRPO experiments whose direction has them: {OWN} (the config's own), "
        f'{", ".join(names)} (default: {OWN})',
    )  # fmt: skip
    parser.add_argument(
        '--reductions', nargs='+', choices=[OWN, *REDUCTIONS], default=[OWN], metavar='NAME',
        help=f"reductions of GRPO's loss: {OWN} (the config's own), {', '.join(REDUCTIONS)} "
        f'(default: {OWN})',
    )  # fmt: skip
    parser.add_argument(
        '--worlds', nargs='+', choices=list(WORLDS), default=['both'],
        help='sources that are trained and validated on: both (as the config has it), scenes, '
        'collages (default: both)',
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
    """Trains and evaluates everything, and draws the held-out curves.

    Returns:
        A row per run: its gains in held-out numbers.
    """
    args.work_dir.mkdir(parents=True, exist_ok=True)
    jobs = plan(args)
    starts: dict[tuple[str, str], tuple[str, dict[str, float]]] = {}
    # Many experiments start from the same weights, and are held to the same regions.
    measured: dict[tuple[float, str], tuple[str, dict[str, float]]] = {}
    for job in jobs:
        if (job.name, job.world) in starts:
            continue
        experiment = EXPERIMENTS[job.name]
        config = read_config(experiment, job.world)
        same = (experiment.noise, str(config.val_dataloader.dataset))
        if same not in measured:
            measured[same] = prepare(experiment, config, args)
        starts[job.name, job.world] = measured[same]
    # Configs are read here: mmengine's lazy import is not made for threads.
    paths = [write_config(job, starts[job.name, job.world][0], args) for job in jobs]
    cores = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    rows = []
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(train, path, job.seed, cores) for path, job in zip(paths, jobs)]
        for path, job, done in zip(paths, jobs, runs, strict=True):
            before = starts[job.name, job.world][1]
            row = _row(job, before, path, done.result(), args.regions)
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    plot = PLOT if args.update_docs else args.work_dir / PLOT.name
    draw_curves(plot, [(job, path.parent) for job, path in zip(jobs, paths, strict=True)])
    # Only clips have a number of all frames.
    filled = [key for key in rows[0] if any(row[key] != '' for row in rows)]
    return [{key: row[key] for key in filled} for row in rows]


def plan(args: argparse.Namespace) -> list[Job]:
    """The runs of the matrix, those of one comparison behind one another.

    What an experiment does not know (a reward of the other direction, a reduction where there is no
    GRPO, a control without a reward) is left out of it.
    """
    jobs = []
    for name in args.only:
        experiment = EXPERIMENTS[name]
        rewards = rewards_of(experiment, args.rewards)
        reductions = args.reductions if name.startswith('grpo/') else [OWN]
        kinds = [False] if experiment.direction is None or args.no_control else [False, True]
        for world in ['both'] if experiment.own_world else args.worlds:
            for reward, reduction in product(rewards, reductions):
                for seed, control in product(args.seeds, kinds):
                    jobs.append(Job(name, seed, reward, control, reduction, world))
    return jobs


def read_config(experiment: Experiment, world: str) -> Any:
    """The config of an experiment, with the sources of one world."""
    from mmengine.config import Config

    config = Config.fromfile(ROOT / 'configs' / experiment.config)
    keep_world(config, world)
    return config


def prepare(
    experiment: Experiment, config: Any, args: argparse.Namespace
) -> tuple[str, dict[str, float]]:
    """The folder of the model that the runs start from, and its held-out numbers."""
    import torch

    from projects.llava_sam2_rl.registry import MODELS

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


def keep_world(config: Any, world: str) -> None:
    """Leaves the sources of one world in a config, for training and validation."""
    kept = WORLDS[world]
    if kept is None:
        return

    def source(dataset: Any) -> str:
        return getattr(dataset.type, '__name__', str(dataset.type)).rsplit('.', 1)[-1]

    train = config.train_dataloader.dataset
    train.datasets = [dataset for dataset in train.datasets if source(dataset) == kept]
    config.val_dataloader.dataset.type = f'projects.llava_sam2_rl.datasets.{kept}'


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
    experiment = EXPERIMENTS[job.name]
    config = read_config(experiment, job.world)
    config.merge_from_dict({**experiment.options, 'model.policy.pretrained': start})
    if job.reduction != OWN:
        config.model.objective.reduction = job.reduction
    if experiment.direction is not None and (job.control or job.reward != OWN):
        # Replaced, not merged into the reward that is there.
        reward = {**reward_config(config, job), '_delete_': True}
        config.merge_from_dict({f'model.objective.{experiment.direction}': {'reward': reward}})
    if 'caption_logps_other_regions' in _needs(config, experiment.direction):
        # Two regions of an image that can be compared, and as many regions a step as before.
        config.train_dataloader.batch_size //= 2
        for dataset in config.train_dataloader.dataset.datasets:
            dataset.num_regions = 2
    if args.iters:
        config.train_cfg.max_iters = args.iters
    length = config.train_cfg.get('max_iters') or config.train_cfg.default_length.max_iters
    for dataset in config.train_dataloader.dataset.datasets:
        dataset.withhold_captions = not experiment.captions
    config.default_hooks.checkpoint.interval = length
    config.train_cfg.val_interval = max(1, length // CURVE_POINTS)
    config.val_dataloader.dataset.length = min(CURVE_REGIONS, args.regions)
    folder = args.work_dir / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    config.dump(folder / 'config.py')
    return folder / 'config.py'


def _needs(config: Any, direction: str | None) -> Sequence[str]:
    from projects.llava_sam2_rl.registry import build_reward
    from projects.llava_sam2_rl.rewards import needs_of

    if direction is None:
        return ()
    return needs_of(build_reward(config.model.objective[direction].reward))


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
        'reduction': job.reduction if job.name.startswith('grpo/') else '',
        'world': job.world,
        'seed': job.seed,
        'training s': round(seconds),
        'zero-variance groups': _mean_of_log(folder, experiment, 'frac_reward_zero_std'),
    }
    for key in NUMBERS:
        if key not in before:
            row[key] = ''
            continue
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


def draw_curves(path: Path, runs: Sequence[tuple[Job, Path]]) -> None:
    """A panel per experiment and world: the mean over seeds of its first held-out number, by step.

    The band goes from the lowest to the highest seed.

    Args:
        path: PNG that is written.
        runs: Each with its folder.
    """
    from matplotlib.figure import Figure

    from projects.llava_sam2_rl.report.logs import read_scalars

    series: dict[tuple[str, str, str, str], list[dict[int, float]]] = {}
    for job, folder in runs:
        key = f'cycle/{EXPERIMENTS[job.name].shows[0]}'
        series.setdefault(job.series, []).append(dict(read_scalars(folder).curve(key)))
    panels = list(dict.fromkeys((name, world) for name, _, _, world in series))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout='constrained')
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for (name, world), axis in zip(panels, axes):
        for (of, reward, reduction, where), curves in series.items():
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            if (of, where) != (name, world) or not steps:
                continue
            values = [[curve[step] for curve in curves] for step in steps]
            label = reward if reduction == OWN else f'{reward}, {reduction}'
            (line,) = axis.plot(steps, [sum(v) / len(v) for v in values], label=label)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_title(f'{name}, {world}' if world != 'both' else name, fontsize=10)
        axis.set_xlabel('step', fontsize=9)
        axis.set_ylabel(f'held-out {EXPERIMENTS[name].shows[0]}', fontsize=9)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
