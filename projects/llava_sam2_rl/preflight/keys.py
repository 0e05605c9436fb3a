"""Config keys that nobody reads, in every section, each with the nearest that somebody does."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine import registry as mm
from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.registry import Registry
from mmengine.runner import Runner
from mmengine.utils import get_object_from_string
from peft import LoraConfig
from torch.utils.data import DataLoader

from projects.llava_sam2_rl import registry
from projects.llava_sam2_rl.engine.dataloader_config import LOADERS, bare_name
from projects.llava_sam2_rl.models.objectives.grpo_caption_to_mask import CaptionToMaskOptions
from projects.llava_sam2_rl.models.objectives.grpo_mask_to_caption import MaskToCaptionOptions
from projects.llava_sam2_rl.models.schedule import (
    AdaptiveWeights,
    Curriculum,
    GeometricSchedule,
    TaskWeight,
)
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.preflight.problems import Problem
from projects.llava_sam2_rl.prompts.questions import Questions
from projects.llava_sam2_rl.registry import DATASETS, known_names, nearest

# Sections that are read from the config itself rather than passed to the runner: by mmengine
# (runner, model wrapper, compilation), by `xtuner train`, and by the checks of this folder.
_READ_ELSEWHERE = (
    'dataset_defaults',
    'preflight',
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'framework',
    'model_wrapper_cfg',
    'sequence_parallel_size',
    'strategy',
    'strategy_config',
    'model_resource',
    'runner_type',
    'tokenizer',
    'use_varlen_attn',
    'vis_backends',
)

# Dictionaries without a type: (class whose option it is, option) -> what takes its keys.
_UNTYPED: dict[tuple[str, str], Callable[..., Any]] = {
    ('DualLoopModel', 'teacher'): EMATeacher,
    ('DualLoopModel', 'mask_to_caption'): TaskWeight,
    ('DualLoopModel', 'caption_to_mask'): TaskWeight,
    ('DualLoopModel', 'chat'): TaskWeight,
    ('DualLoopModel', 'adaptive_weights'): AdaptiveWeights,
    ('DualLoopModel', 'curriculum'): Curriculum,
    ('VideoLLaVASAMModel', 'lora'): LoraConfig,
    ('VideoLLaVASAMModel', 'questions'): Questions,
    ('GRPOObjective', 'mask_to_caption'): MaskToCaptionOptions,
    ('GRPOObjective', 'caption_to_mask'): CaptionToMaskOptions,
    ('GumbelObjective', 'tau'): GeometricSchedule,
}
# The same for whole sections.
_UNTYPED_SECTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(LOADERS, DataLoader),
    'randomness': Runner.set_randomness,
}
# Keys that the one who builds takes out before the class sees the rest.
_TAKEN_OUT = {
    'optim_wrapper': ('constructor', 'paramwise_cfg'),
    'param_scheduler': ('convert_to_iter_based',),
    'default_hooks': ('priority',),
    'custom_hooks': ('priority',),
    'train_cfg': ('by_epoch',),
    'env_cfg': ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'),
    # `WeightedRewards` has both for each of its terms.
    'model': ('weight', 'name'),
    'preflight': ('skip',),
}
# Hooks that mmengine adds where `default_hooks` says nothing of them.
_MMENGINES_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler')

_REGISTRIES = [
    one for module in (registry, mm) for one in vars(module).values() if isinstance(one, Registry)
]


def check_keys(cfg: Config) -> list[Problem]:
    """Sections, options and types that nobody reads or knows.

    Args:
        cfg: Config of a run. Of the file's own variables those pass that look like nothing that
            is read; those that came by an override do not.
    """
    return [
        *_sections(cfg),
        *_options(cfg),
        *_defaults(cfg),
        *_hooks_without_type(cfg),
    ]


def known_sections() -> tuple[str, ...]:
    """Top-level config keys that mmengine's runner, ``xtuner train`` or this package read."""
    return (*list(inspect.signature(Runner.__init__).parameters)[1:], *_READ_ELSEWHERE)


def misspelled_sections(
    cfg: Mapping[str, Any], allow: tuple[str, ...] = (), cutoff: float = 0.8
) -> Iterator[tuple[str, str]]:
    """``(section, nearest known one)`` for each that nobody reads and that looks misspelled."""
    known = {*known_sections(), *allow}
    for key, value in cfg.items():
        if key in known or not isinstance(value, dict):
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=cutoff)
        if close:
            yield key, close[0]


def _sections(cfg: Config) -> Iterator[Problem]:
    """Sections that look misspelled, and overrides of what nobody reads."""
    own = (cfg.get('default_hooks') or {}).get('config_check') or {}
    allow = tuple(own.get('allow', ()))
    known = (*known_sections(), *allow)
    found = dict(misspelled_sections(cfg, allow, own.get('cutoff', 0.8)))
    for key, meant in found.items():
        yield Problem(
            key,
            'nobody reads a section of this name',
            f'did you mean {meant!r}? If it is meant: default_hooks.config_check.allow={key}',
        )
    for key, in_file in _overridden(cfg):
        if key in known or key in found:
            continue
        if in_file:
            yield Problem(
                key,
                "this is a variable of the config's file, whose sections were made before it was "
                'overridden: the override reaches nothing',
                'override the place where it is used, as train_dataloader.dataset.…',
            )
        else:
            yield Problem(
                key,
                'nobody reads a section of this name',
                f'{nearest(key, sorted(known))}'
                if difflib.get_close_matches(key, known, n=1, cutoff=0.6)
                else 'leave it out, or give the full path, as model.objective.beta=0.05',
            )


def _overridden(cfg: Config) -> Iterator[tuple[str, bool]]:
    """Sections that are other than in the config's file, and whether the file has them at all."""
    if not cfg.filename or not Path(cfg.filename).is_file():
        return
    written = Config.fromfile(cfg.filename)._to_lazy_dict()
    for key, value in cfg._to_lazy_dict().items():
        if key not in written:
            yield key, False
        elif _by_name(value) != _by_name(written[key]):
            yield key, True


def _by_name(value: Any) -> Any:
    """For a comparison: classes by their names, whether mmengine has imported them or not."""
    if isinstance(value, dict):
        return {key: _by_name(item) for key, item in dict.items(value)}
    if isinstance(value, list | tuple):
        return [_by_name(item) for item in value]
    return value if isinstance(value, str | int | float | None) else bare_name(value)


def _options(cfg: Config) -> Iterator[Problem]:
    """Options that the class or function they are for does not have."""
    for section, value in cfg.items():
        if section not in known_sections() or section == 'dataset_defaults':
            continue
        taken_out = _TAKEN_OUT.get(section, ())
        if isinstance(value, dict) and 'type' not in value and section in _UNTYPED_SECTIONS:
            yield from _wrong_keys(value, section, _UNTYPED_SECTIONS[section], ())
        elif section in ('env_cfg', 'preflight') and isinstance(value, dict):
            yield from _unknown(value, section, list(taken_out), section)
        yield from _walk(value, section, taken_out)


def _walk(value: Any, where: str, taken_out: tuple[str, ...]) -> Iterator[Problem]:
    if isinstance(value, list | tuple):
        for n, item in enumerate(value):
            yield from _walk(item, f'{where}.{n}', taken_out)
    if not isinstance(value, dict):
        return
    kind = ''
    if 'type' in value:
        kind = bare_name(dict.__getitem__(value, 'type'))
        try:
            target = find_type(value)
        except (KeyError, ImportError, AttributeError) as error:
            yield Problem(f'{where}.type', str(error).strip('"'), 'correct the name')
            return
        if target is not None:
            yield from _wrong_keys(value, where, target, taken_out)
    for key in value:
        try:
            item = value[key]
        except ImportError as error:
            yield Problem(f'{where}.{key}', str(error), 'correct the name')
            continue
        takes = _UNTYPED.get((kind, key))
        if takes is not None and isinstance(item, dict) and 'type' not in item:
            yield from _wrong_keys(item, f'{where}.{key}', takes, ())
        yield from _walk(item, f'{where}.{key}', taken_out)


def find_type(node: Mapping[str, Any]) -> Any:
    """The class or function that a node's ``type`` names; ``None`` where only its section knows.

    Raises:
        KeyError: A name that no registry has; names the nearest.
        ImportError, AttributeError: An import path that leads nowhere.
    """
    kind = node['type']
    if isinstance(kind, LazyObject):
        kind = kind.build()
    if not isinstance(kind, str):
        return kind
    name = kind.rpartition('/')[2]
    for one in _REGISTRIES:
        found = one.module_dict.get(name)
        if found is not None:
            return found
    if '.' in name:
        found = get_object_from_string(name)
        if found is None:
            raise ImportError(f'there is no {name}')
        return found
    # What is registered when it is first asked for. mmengine's own are: asking its strategies
    # would import DeepSpeed.
    for one in vars(registry).values():
        found = one.get(name) if isinstance(one, Registry) else None
        if found is not None:
            return found
    names = sorted({name for one in _REGISTRIES for name in known_names(one)})
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f'did you mean {close[0]!r}?' if close else 'import its module in custom_imports'
    raise KeyError(f'{name!r} is not registered: {hint}')


def _wrong_keys(
    node: Mapping[str, Any], where: str, target: Callable[..., Any], taken_out: tuple[str, ...]
) -> Iterator[Problem]:
    valid = valid_options(target)
    if valid is None:
        return
    yield from _unknown(node, where, valid, getattr(target, '__name__', str(target)), taken_out)


def _unknown(
    node: Mapping[str, Any],
    where: str,
    valid: list[str],
    name: str,
    taken_out: tuple[str, ...] = (),
) -> Iterator[Problem]:
    for key in node:
        if key in valid or key in taken_out or key in ('type', '_scope_'):
            continue
        yield Problem(f'{where}.{key}', f'{name} has no such option', nearest(key, valid))


def valid_options(target: Callable[..., Any]) -> list[str] | None:
    """Names that a class or function takes; ``None`` where it takes any.

    A class whose ``__init__`` hands ``**kwargs`` on takes those of the classes behind it too.
    """
    chain = [target]
    if inspect.isclass(target):
        chain = [vars(cls)['__init__'] for cls in target.__mro__ if '__init__' in vars(cls)]
    names: list[str] = []
    for function in chain:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # builtins without a signature
            return None
        named = (p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        names += [name for name in named if name != 'self']
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
        # DualLoopModel takes unknown options to name them, and hands none of them on.
        if any(p.name == 'unknown' and p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return None


def _defaults(cfg: Config) -> Iterator[Problem]:
    """Classes of ``dataset_defaults`` that there are not, and options that they do not have."""
    names = [*known_names(DATASETS), *known_names(registry.TRANSFORMS)]
    for name, options in (cfg.get('dataset_defaults') or {}).items():
        where = f'dataset_defaults.{name}'
        found = DATASETS.get(name) or registry.TRANSFORMS.get(name) if name in names else None
        if found is None:
            yield Problem(where, 'there is no data set of this name', nearest(name, names))
        elif isinstance(options, dict):
            yield from _wrong_keys(options, where, found, ())


def _hooks_without_type(cfg: Config) -> Iterator[Problem]:
    """``default_hooks.chekpoint.interval=5`` makes a hook of a new name, with nothing to build."""
    hooks = cfg.get('default_hooks') or {}
    names = [*_MMENGINES_HOOKS, 'checkpoint']
    names += [name for name, hook in hooks.items() if isinstance(hook, dict) and 'type' in hook]
    for name, hook in hooks.items():
        if isinstance(hook, dict) and 'type' not in hook and name not in names:
            yield Problem(
                f'default_hooks.{name}', 'the config has no hook of this name', nearest(name, names)
            )
