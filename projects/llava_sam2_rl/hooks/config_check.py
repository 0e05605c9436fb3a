"""Stops a run whose config has a misspelled section or is of an earlier layout."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import LOG_PROCESSORS
from mmengine.runner import FlexibleRunner, LogProcessor, Runner

from projects.llava_sam2_rl.engine.dataloader_config import (
    LOADERS,
    TRANSFORM,
    bare_name,
    typed_nodes,
)
from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.preflight import require
from projects.llava_sam2_rl.preflight.keys import misspelled_sections
from projects.llava_sam2_rl.registry import DATASETS, HOOKS, TRANSFORMS, known_names, nearest
from projects.llava_sam2_rl.utils.pretrained import image_sizes

#: Hooks of this package, which earlier configs had in ``custom_hooks``: class -> entry of
#: ``default_hooks``.
HOOK_NAMES = {
    'ConfigCheckHook': 'config_check',
    'DeepSpeedHook': 'deepspeed',
    'ClusterCheckHook': 'cluster_check',
    'RankSeedHook': 'rank_seed',
    'EMATeacherHook': 'teacher',
    'ProfileHook': 'profile',
    'BadRecordHook': 'bad_records',
    'RolloutHook': 'rollouts',
    'RewardFailureHook': 'reward_failure',
    'ResumedValidationHook': 'resumed_validation',
    'WatchdogHook': 'watchdog',
    'PreemptionHook': 'preemption',
    'ReportHook': 'report',
}
_RENAMED = {'VisitSampler': 'ResumableSampler'}
_SIZES = ('image_size', 'patch_size', 'downsample_ratio', 'grounding_size')


@HOOKS.register_module()
class ConfigCheckHook(Hook):
    """Raises on a top-level section nobody reads whose name is close to one that is read.

    mmengine ignores what it does not know, so ``--cfg-options modle.objective.beta=1`` would train
    with the old beta. Helper variables of a config (of a name of their own) are let pass, and so
    is what is not a dictionary.

    Args:
        allow: Names of the config's own that only look like a misspelling.
        cutoff: How alike two names must be, from 0 to 1 (``difflib``'s ratio).
    """

    priority = 'VERY_HIGH'

    def __init__(self, allow: Sequence[str] = (), cutoff: float = 0.8) -> None:
        self.allow = tuple(allow)
        self.cutoff = cutoff

    def before_run(self, runner: Any) -> None:
        """Checks the runner's config, and that its transforms cut images as the model wants them.

        Raises:
            KeyError: A section looks misspelled. The message names it and the nearest known one.
            ValueError: A transform has other sizes than the model; the message names both.
        """
        for key, meant in misspelled_sections(runner.cfg, self.allow, self.cutoff):
            raise KeyError(
                f'the config has a section {key!r} that nobody reads; did you mean {meant!r}? '
                '(If it is meant, rename it or add it to ConfigCheckHook(allow=[...]))'
            )
        for name in runner.cfg.get('dataset_defaults') or {}:
            names = {*known_names(DATASETS), *known_names(TRANSFORMS)}
            if name not in names:
                raise KeyError(
                    f'dataset_defaults names {name!r}, no data set: {nearest(name, sorted(names))}'
                )
        check_transforms(runner)


def check_transforms(runner: Any) -> None:
    """Compares the transforms of the data loaders that are built with the model.

    Raises:
        ValueError: As in `ConfigCheckHook`.
    """
    model = unwrapped(runner) if hasattr(runner, 'model') else None
    policy = getattr(model, 'policy', None)
    if policy is None or not isinstance(getattr(policy, 'config', None), Mapping):
        return
    sizes = image_sizes(policy.config)
    for name in LOADERS:
        loop = getattr(runner, f'_{name.removesuffix("_dataloader")}_loop', None)
        # A loop that this run has not needed yet is still a dictionary.
        dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
        for where, transform in _transforms(dataset, f'{name}.dataset'):
            theirs = transform.sizes
            if theirs != sizes:
                key = next(key for key in sizes if sizes[key] != theirs[key])
                raise ValueError(
                    f'{where} makes images for a model of {key} {theirs[key]}, the model '
                    f'(model.policy) has {sizes[key]}: leave sizes out of the transform, and take '
                    'DualLoopTrainLoop, DualLoopValLoop and BenchmarkTestLoop, which fill them in'
                )


def _transforms(dataset: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The transforms of a data set and of those that it mixes, with their places."""
    transform = getattr(dataset, 'transforms', None)
    if hasattr(transform, 'sizes'):
        yield f'{where}.transforms', transform
    for n, part in enumerate(getattr(dataset, 'datasets', ())):
        yield from _transforms(part, f'{where}.datasets.{n}')


def check_layout(config: Any) -> None:
    """Refuses a config of an earlier version of this package, before anything is built of it.

    Raises:
        ValueError: Names each key that moved, and its new place.
    """
    plain = config._to_lazy_dict() if isinstance(config, Config) else config
    model = plain.get('model')
    if not isinstance(model, dict) or bare_name(model.get('type')) != 'DualLoopModel':
        return
    moved = list(moved_keys(plain))
    if moved:
        lines = '\n'.join(f'  {old}: {new}' for old, new in moved)
        raise ValueError(
            f'the config is of an earlier version of llava_sam2_rl ({len(moved)} keys have moved):'
            f'\n{lines}\nSee "Coming from an earlier version" in docs/troubleshooting.md.'
        )


def moved_keys(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """``(key of an earlier layout, what takes its place)`` for all in a config."""
    hooks = config.get('custom_hooks')
    for n, hook in enumerate(hooks if isinstance(hooks, list | tuple) else ()):
        name = bare_name(hook.get('type')) if isinstance(hook, dict) else ''
        if name in HOOK_NAMES:
            yield f'custom_hooks.{n} ({name})', f'default_hooks.{HOOK_NAMES[name]}'
    for where, name, node in typed_nodes(dict(config)):
        if name in _RENAMED:
            yield f'{where}.type={name}', f'{where}.type={_RENAMED[name]}'
        if name == TRANSFORM:
            keys = [key for key in _SIZES if key in node]
            if keys:
                yield (
                    f'{where}.{", ".join(keys)}',
                    "leave out, model.policy's are taken",
                )
    loops = {'train_cfg': 'DualLoopTrainLoop', 'val_cfg': 'DualLoopValLoop'}
    for section, loop in loops.items():
        kind = (config.get(section) or {}).get('type')
        if kind is not None and bare_name(kind) in ('TrainLoop', 'ValLoop'):
            yield f'{section}.type={bare_name(kind)}', f'{section}.type={loop}'


@LOG_PROCESSORS.register_module()
class RunLogProcessor(LogProcessor):
    """mmengine's, option for option, and the first of this package that a runner builds.

    `xtuner train` reads a config without importing anything of it, and the runner builds the model,
    weights and all, before its hooks. What this module does when it is imported comes before both.
    """


def _check_first(runner: Any) -> None:
    """Has a runner class check what it is given first: the layout, and the rest for xtuner."""
    if getattr(runner, '_checks_layout', False):
        return
    from_cfg, train = runner.from_cfg.__func__, runner.train
    build_model = getattr(runner, 'build_model', None)

    @functools.wraps(from_cfg)
    def checked_from_cfg(cls: type, cfg: Any) -> Any:
        check_layout(cfg)
        return from_cfg(cls, cfg)

    @functools.wraps(build_model or train)
    def checked_build_model(self: Any, model: Any) -> Any:
        _check_for_xtuner(self)
        return build_model(self, model)  # type: ignore[misc]

    @functools.wraps(train)
    def checked_train(self: Any) -> Any:
        # Once more: a config that is not dumped imports this package while the runner is built.
        check_layout(self.cfg)
        _check_for_xtuner(self)
        return train(self)

    runner.from_cfg, runner.train = classmethod(checked_from_cfg), checked_train
    if build_model is not None:
        runner.build_model = checked_build_model
    runner._checks_layout = True


def _check_for_xtuner(runner: Any) -> None:
    """`preflight.require`, once, in a process that `xtuner train` or `xtuner test` started.

    Either starts a file of its package, by the same name. The launchers of this project check by
    themselves, and whoever builds a runner in a program knows best when.
    """
    script = Path(sys.argv[0])
    if script.parts[-3:-1] != ('xtuner', 'tools') or getattr(runner, '_is_checked', False):
        return
    runner._is_checked = True
    require(runner.cfg, (script.stem,))


for _runner in (Runner, FlexibleRunner):
    _check_first(_runner)
