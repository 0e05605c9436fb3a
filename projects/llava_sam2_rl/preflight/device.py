"""Whether this machine computes in the config's precision, and has the memory that it takes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from mmengine.config import Config

from projects.llava_sam2_rl.engine.dataloader_config import bare_name
from projects.llava_sam2_rl.models.sa2va.quantization import check_quantization
from projects.llava_sam2_rl.preflight.launcher import all_processes, local_processes
from projects.llava_sam2_rl.preflight.memory import Sizes, predict
from projects.llava_sam2_rl.preflight.problems import Problem
from projects.llava_sam2_rl.utils.errors import StackError

# Parts of the prediction that a test needs too.
_KEPT_IN_A_TEST = (
    'frozen weights',
    'frozen weights in 4 or 8 bits',
    'one of them as it is used',
    'trained weights',
    'key/value cache',
    'SAM 2 features',
)
# The options that would give the same schedule on a machine without a GPU.
_ON_CPU = (
    'take a machine with a GPU; or --cfg-options optim_wrapper._delete_=True '
    'optim_wrapper.type=OptimWrapper optim_wrapper.optimizer.type=AdamW '
    'optim_wrapper.optimizer.lr={lr} optim_wrapper.accumulative_counts={counts}'
)


def check_precision(cfg: Config, stage: str) -> list[Problem]:
    """Autocast and the policy's number format against what there is to compute on.

    Args:
        cfg: Config of a run.
        stage: ``'train'`` or ``'test'``; a test has no optimizer.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    kind, dtype = bare_name(wrapper.get('type', '')), wrapper.get('dtype')
    on_gpu = torch.cuda.is_available()
    found = []
    if stage == 'train' and kind in ('AmpOptimWrapper', 'ApexOptimWrapper') and not on_gpu:
        fix = _ON_CPU.format(
            lr=(wrapper.get('optimizer') or {}).get('lr', 1e-5),
            counts=wrapper.get('accumulative_counts', 1),
        )
        text = f'{kind} works on a GPU only, and PyTorch {torch.__version__} sees none here'
        found.append(Problem('optim_wrapper.type', text, fix))
    bf16 = {
        'optim_wrapper.dtype': dtype if stage == 'train' else None,
        'model.policy.torch_dtype': cfg.model.policy.get('torch_dtype'),
    }
    for key, value in bf16.items():
        if value in ('bfloat16', torch.bfloat16) and on_gpu and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name()
            found.append(
                Problem(key, f'{name} does not compute in bfloat16', f'--cfg-options {key}=float16')
            )
    return found


def check_quantized(cfg: Config) -> list[Problem]:
    """``model.policy.quantization`` against bitsandbytes, the rest of the policy, and ZeRO-3."""
    policy, key = cfg.model.policy, 'model.policy.quantization'
    kind = policy.get('quantization')
    if kind is None:
        return []
    off = f'{key}=None is the policy in its torch_dtype'
    if zero_stage(cfg) == 3:
        text = f'{kind} and ZeRO-3, which takes weights in parts: those of 4 or 8 bits have none'
        return [Problem(key, text, f'--deepspeed deepspeed_zero2; or {off}')]
    try:
        check_quantization(kind, policy.get('trainable', ()), policy.get('lora'))
    except (ValueError, StackError) as error:
        return [Problem(key, str(error), off)]
    return []


def zero_stage(cfg: Config) -> int:
    """Stage of ZeRO that a config asks for; 0 where it does not."""
    zero = ((cfg.get('strategy') or {}).get('config') or {}).get('zero_optimization') or {}
    return int(zero.get('stage', 0))


def check_memory(cfg: Config, sizes: Sizes, stage: str) -> list[Problem]:
    """The predicted peak against what the GPU, or the machine without one, has free.

    Args:
        cfg: Config of a run.
        sizes: From `read_sizes`.
        stage: ``'train'`` or ``'test'``.
    """
    if stage == 'test':
        sizes = dataclasses.replace(sizes, batch=cfg.test_dataloader.batch_size)
    processes, local = all_processes(os.environ), local_processes(os.environ)
    stage_here = zero_stage(cfg)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count())
        free, place = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    else:
        # Every process of the machine takes its own.
        free, place = psutil.virtual_memory().available // local, 'each process of this machine'

    def needs(change: Mapping[str, Any], stage_of_zero: int = stage_here) -> int:
        changed = dataclasses.replace(sizes, **change)
        parts = predict(changed, processes, stage_of_zero)
        if stage == 'test':
            return sum(size for name, size in parts.items() if name in _KEPT_IN_A_TEST)
        return sum(parts.values())

    if needs({}) <= free:
        return []
    key = f'{stage}_dataloader.batch_size'
    small: dict[str, Any] = {'batch': 1}
    tries = [(f'{key}=1', needs(small))]
    if stage == 'train' and sizes.group > 2:
        small = {**small, 'group': 2}
        tries.append((f'{tries[-1][0]} model.objective.num_generations=2', needs(small)))
    if sizes.tokens > 32:
        small = {**small, 'tokens': 32}
        tries.append((f'{tries[-1][0]} model.max_new_tokens=32', needs(small)))
    fitting = [(options, size) for options, size in tries if size <= free]
    if fitting:
        options, size = fitting[0]
        fix = f'--cfg-options {options} (about {size / 1e9:.1f} GB)'
    elif stage == 'train' and not stage_here and needs(small, 2) <= free:
        fix = f'--deepspeed deepspeed_zero2 --cfg-options {tries[-1][0]}'
    else:
        fix = (
            f'a smaller model or more memory: even {tries[-1][0]} takes {tries[-1][1] / 1e9:.1f} GB'
        )
    return [
        Problem(
            key,
            f'the run takes about {needs({}) / 1e9:.1f} GB at batch size {sizes.batch} '
            f'({sizes.group} rollouts of {sizes.tokens} tokens; python tools/memory.py has the '
            f'parts), {place} has {free / 1e9:.1f} GB free',
            f'{fix}; to start all the same: preflight.skip=memory',
        )
    ]
