"""What ``--deepspeed`` means, and what of the config takes the place of its values."""

from __future__ import annotations

import difflib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.logging import print_log

# Where mmengine's `FlexibleRunner` finds the strategy. Not imported here: DeepSpeed takes seconds.
_STRATEGY = ('projects.llava_sam2_rl.engine.deepspeed', 'DualLoopDeepSpeedStrategy')
#: The names that ``xtuner train --deepspeed`` knows: stage, and whether the CPU takes part.
NAMES = {
    'deepspeed_zero1': (1, False),
    'deepspeed_zero2': (2, False),
    'deepspeed_zero2_offload': (2, True),
    'deepspeed_zero3': (3, False),
    'deepspeed_zero3_offload': (3, True),
}


def named_config(stage: int, offload: bool) -> dict[str, Any]:
    """The settings that xtuner 0.2.0 ships under one of `NAMES`; a test compares them."""
    zero: dict[str, Any] = {'stage': stage, 'overlap_comm': True}
    device = {'device': 'cpu', 'pin_memory': True}
    if offload:
        zero['offload_optimizer'] = device
    if stage == 3:
        zero['stage3_gather_16bit_weights_on_model_save'] = True
        if offload:
            zero['offload_param'] = dict(device)
    return {
        'gradient_accumulation_steps': 'auto',
        'train_micro_batch_size_per_gpu': 'auto',
        'gradient_clipping': 'auto',
        'zero_allow_untested_optimizer': True,
        'zero_force_ds_cpu_optimizer': False,
        'zero_optimization': zero,
        'fp16': {'enabled': 'auto', 'initial_scale_power': 16},
        'bf16': {'enabled': 'auto'},
    }


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """The settings that ``--deepspeed`` means: those of a JSON file, or of one of `NAMES`.

    Raises:
        FileNotFoundError: There is neither; the message names the nearest.
        ValueError: The file is no JSON object.
    """
    path = Path(name)
    if not path.is_file():
        if name in NAMES:
            return named_config(*NAMES[name])
        own = sorted(str(p) for p in Path('configs/deepspeed').glob('*.json'))
        known = [*own, *NAMES]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f'did you mean {close[0]}?' if close else f'there are: {", ".join(known)}'
        raise FileNotFoundError(f'there is no DeepSpeed config {name}: {hint}')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path} holds a {type(config).__name__}, a DeepSpeed config is an object')
    return config


def use_deepspeed(config: Config, settings: dict[str, Any]) -> None:
    """Makes of a run's config one under DeepSpeed, in place.

    The runner becomes mmengine's ``FlexibleRunner``. Of ``optim_wrapper`` only the optimizer
    stays; micro-batch, accumulation and clipping (1.0 where the config has none) are the config's,
    whatever the JSON says, and a warning says so where they differ.

    Args:
        config: Of the run. One whose ``optim_wrapper`` is DeepSpeed's already is left as it is.
        settings: Of DeepSpeed, from `read_deepspeed_config`.
    """
    optim_wrapper = config.optim_wrapper
    if optim_wrapper.type == 'DeepSpeedOptimWrapper':
        _warn('The config itself sets DeepSpeed up: --deepspeed is not used.')
        return
    clipping = (optim_wrapper.get('clip_grad') or {}).get('max_norm')
    values = {
        'gradient_accumulation_steps': optim_wrapper.get('accumulative_counts', 1),
        'train_micro_batch_size_per_gpu': config.train_dataloader.batch_size,
        'gradient_clipping': 1.0 if clipping is None else clipping,
    }
    for key, value in values.items():
        given = settings.get(key, 'auto')
        if given not in ('auto', value):
            _warn(f'{key} of the DeepSpeed config is {given}, the config says {value}: {value}.')
    config.strategy = dict(
        type=LazyObject(*_STRATEGY),
        config=with_dtype(settings),
        exclude_frozen_parameters=True,
        **values,
    )
    config.optim_wrapper = dict(type='DeepSpeedOptimWrapper', optimizer=optim_wrapper.optimizer)
    config.runner_type = 'FlexibleRunner'


def with_dtype(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with ``"auto"`` of ``fp16.enabled`` and ``bf16.enabled`` decided.

    bfloat16 wherever it can be (also on a CPU), float16 on other GPUs.
    """
    on_gpu = torch.cuda.is_available()
    possible = {'fp16': on_gpu, 'bf16': torch.cuda.is_bf16_supported() if on_gpu else True}
    settings = dict(settings)
    for kind, can in possible.items():
        section = settings.get(kind)
        if section and section.get('enabled') == 'auto':
            settings[kind] = {**section, 'enabled': can}
    both = all((settings.get(kind) or {}).get('enabled') is True for kind in possible)
    if both:
        settings['fp16'] = {**settings['fp16'], 'enabled': False}
    return settings


def _warn(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)
