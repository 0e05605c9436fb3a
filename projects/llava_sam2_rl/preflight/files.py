"""Files and folders that a config names: the checkpoint's, and those of its data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from projects.llava_sam2_rl.engine.checkpoint_files import check_file
from projects.llava_sam2_rl.engine.dataloader_config import bare_name, complete_dataloader
from projects.llava_sam2_rl.models.sa2va.checkpoint import weight_files
from projects.llava_sam2_rl.preflight.problems import Problem
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.pretrained import (
    check_tokenizer_config,
    complete_sizes,
    image_sizes,
    resolve,
    sizes_folder,
)

# Options of a data set that name something which must be there. A cache is made by the run.
_PATH = re.compile(r'(?<!^cache)_(root|dir|file|folder|path)$')
#: Sections whose data a stage reads.
LOADERS_OF = {'train': ('train_dataloader', 'val_dataloader'), 'test': ('test_dataloader',)}


@dataclass(frozen=True, eq=False)
class Source:
    """One data source of a config.

    Args:
        where: Its place in the config.
        options: Its config, completed from ``dataset_defaults`` and the model.
        from_defaults: Options that ``dataset_defaults`` gave.
    """

    where: str
    options: dict[str, Any]
    from_defaults: frozenset[str]

    @property
    def name(self) -> str:
        """Its class."""
        return bare_name(dict.__getitem__(self.options, 'type'))

    def key(self, option: str) -> str:
        """Where an option of it is set."""
        if option in self.from_defaults:
            return f'dataset_defaults.{self.name}.{option}'
        return f'{self.where}.{option}'


def check_checkpoint_folder(cfg: Config) -> list[Problem]:
    """The pretrained model's folder: its config, its weight files by name, its tokenizer."""
    policy = cfg.model.policy
    found = []
    pretrained = policy.get('pretrained')
    if pretrained is not None:
        key = 'model.policy.pretrained'
        fix = f'download it (README, "Training Sa2VA-4B"), or --cfg-options {key}=FOLDER'
        try:
            complete_sizes(pretrained, policy)
            weight_files(resolve(pretrained))
            check_tokenizer_config(resolve(pretrained))
        except (CheckpointError, OSError, ValueError, KeyError) as error:
            found.append(Problem(key, _text(error), fix))
    for key, value in (
        ('model.policy.checkpoint', policy.get('checkpoint')),
        ('load_from', cfg.get('load_from')),
    ):
        if isinstance(value, str):
            try:
                check_file(value)
            except (CheckpointError, OSError) as error:
                found.append(Problem(key, _text(error), f'--cfg-options {key}=FILE'))
    return found


def model_sizes(cfg: Config) -> dict[str, Any] | None:
    """What the model asks of images; ``None`` where neither checkpoint nor config says."""
    policy = cfg.model.policy
    pretrained = policy.get('pretrained')
    folder = None if pretrained is None else sizes_folder(pretrained)
    try:
        return image_sizes(complete_sizes(folder, policy))
    except (CheckpointError, ValueError, OSError, KeyError):
        return None


def find_sources(cfg: Config, stage: str) -> tuple[list[Source], list[Problem]]:
    """The data sources of a stage, and what is wrong with the sizes of their transforms.

    Args:
        cfg: Config of a run.
        stage: ``'train'`` (with its validation) or ``'test'``.
    """
    defaults = cfg.get('dataset_defaults') or {}
    completing: dict[str, Any] = {'dataset_defaults': defaults}
    if model_sizes(cfg) is not None:
        pretrained = cfg.model.policy.get('pretrained')
        folder = None if pretrained is None else sizes_folder(pretrained)
        completing['model'] = {'policy': {**cfg.model.policy, 'pretrained': folder}}
    sources: list[Source] = []
    found: list[Problem] = []
    for loader in LOADERS_OF[stage]:
        given = cfg.get(loader)
        if not isinstance(given, dict) or not isinstance(given.get('dataset'), dict):
            continue
        where = f'{loader}.dataset'
        try:
            completed = complete_dataloader(given, completing)
        except ValueError as error:
            place = str(error).partition(' ')[0]
            found.append(Problem(f'{loader}.{place}', str(error), 'leave the option out'))
            continue
        sources += _leaves(completed['dataset'], given['dataset'], where, defaults)
    return sources, found


def _leaves(options: Any, given: Any, where: str, defaults: Mapping[str, Any]) -> Iterator[Source]:
    parts = options.get('datasets')
    if isinstance(parts, list | tuple):
        for n, (part, own) in enumerate(zip(parts, given['datasets'], strict=True)):
            if isinstance(part, dict):
                yield from _leaves(part, own, f'{where}.datasets.{n}', defaults)
        return
    if 'type' not in options:
        return  # `check_keys` says what is wrong with it, or mmengine
    own = defaults.get(bare_name(dict.__getitem__(options, 'type')), {})
    yield Source(where, options, frozenset(key for key in own if key not in given))


def check_paths(source: Source) -> list[Problem]:
    """Options of a source that name a file or folder which is not there.

    A relative one is looked for where the run is started, and below the source's ``data_root``.
    """
    options = source.options
    root = options.get('data_root')
    # A file too: some sources are one. What is a pattern the source itself looks up.
    if isinstance(root, str) and not Path(root).exists() and not set('*?[') & set(root):
        key = source.key('data_root')
        text = f'there is no {root!r} ({source.name})'
        return [Problem(key, text, f'--cfg-options {key}=PATH, or docs/datasets.md to get it')]
    found = []
    for option, value in options.items():
        if option == 'data_root' or not _PATH.search(option):
            continue
        for path in value if isinstance(value, list | tuple) else [value]:
            places = [path] if not isinstance(root, str) else [path, str(Path(root, str(path)))]
            if isinstance(path, str) and not any(Path(place).exists() for place in places):
                key = source.key(option)
                looked = ' nor '.join(repr(place) for place in places)
                text = f'there is neither {looked}' if len(places) > 1 else f'there is no {looked}'
                fix = f'--cfg-options {key}=PATH'
                found.append(Problem(key, f'{text} ({source.name})', fix))
    return found


def _text(error: Exception) -> str:
    """The message; a ``KeyError`` puts its own into quotes."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
