"""From the arguments of a command line to a training: `xtuner train`, on mmengine alone.

xtuner 0.2.0 cannot be imported beside transformers 5, and its command line hides a failed run. The
runs are the same, bit for bit, and so are the arguments.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from projects.llava_sam2_rl.engine.checkpoint_files import load_from_local
from projects.llava_sam2_rl.engine.deepspeed_config import use_deepspeed

# What `xtuner train` reads of a config besides the runner's own sections, and the values with which
# it does nothing.
_XTUNERS = {
    'framework': ('mmengine', None),
    'sequence_parallel_size': (1, None),
    'use_varlen_attn': (False, None),
    'model_resource': (None,),
}


def parse_options(given: Sequence[str] | None) -> dict[str, Any]:
    """The values of ``--cfg-options KEY=VALUE …`` as mmengine's ``DictAction`` reads them.

    Raises:
        ValueError: One has no ``=``.
    """
    for text in given or ():
        if '=' not in text:
            raise ValueError(f'--cfg-options takes KEY=VALUE, got {text!r}')
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='*', action=DictAction, default={})
    return parser.parse_args(['--cfg-options', *(given or ())]).cfg_options


def default_work_dir(config: Config, file: str | Path) -> str:
    """Where a run goes without ``--work-dir``: the config's own value, else by the file's name."""
    return config.get('work_dir') or os.path.join('./work_dirs', Path(file).stem)


def training_config(
    file: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    work_dir: str | None = None,
    resume: str | None = None,
    deepspeed: dict[str, Any] | None = None,
    seed: int | None = None,
    launcher: str = 'none',
) -> Config:
    """The config of a run, with what the command line says in it.

    Args:
        file: Config file.
        options: Values by their full path, which replace the file's.
        work_dir: As ``--work-dir``. Defaults to None, `default_work_dir`.
        resume: Checkpoint to go on from; the seed is the checkpoint's.
        deepspeed: Settings of DeepSpeed, from `read_deepspeed_config`. Defaults to None, without.
        seed: Random seed. Defaults to None, the config's.
        launcher: ``'none' | 'pytorch' | 'slurm' | 'mpi'``.

    Raises:
        ValueError: The config asks for what only xtuner's own command does.
        CheckpointError, FileNotFoundError: As of `load_from_local`, for ``resume``.
    """
    config = Config.fromfile(file)
    config.merge_from_dict(dict(options or {}))
    for key, without in _XTUNERS.items():
        if config.get(key) not in without:
            raise ValueError(
                f'the config has {key}={config[key]!r}, which this launcher does not know: leave '
                'it out, or start the run by `xtuner train`'
            )
    if resume is not None:
        _set_seed(config, _seed_of(resume, seed))
    elif seed is not None:
        _set_seed(config, seed)
    config.launcher = launcher
    config.work_dir = work_dir or default_work_dir(config, file)
    if deepspeed is not None:
        use_deepspeed(config, deepspeed)
    if resume is not None:
        config.resume = True
        config.load_from = resume
    return config


def _seed_of(checkpoint: str, given: int | None) -> int:
    """A checkpoint's seed; a warning where another one was given."""
    seed = load_from_local(checkpoint, map_location='cpu')['meta']['seed']
    if given is not None and given != seed:
        text = f'--seed {given} is not used: {checkpoint} goes on with its own, {seed}.'
        print_log(text, logger='current', level=logging.WARNING)
    return seed


def _set_seed(config: Config, seed: int) -> None:
    config.merge_from_dict({'randomness': {'seed': seed}})
    print_log(f'Set the random seed to {seed}.', logger='current', level=logging.INFO)


def build_runner(config: Config) -> Any:
    """mmengine's ``Runner``, or the class that ``config.runner_type`` names."""
    return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
