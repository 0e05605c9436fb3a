"""DeepSpeed under the same hooks: the model's own step, and whole checkpoints."""

from __future__ import annotations

import functools
import io
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from torch import Tensor

from projects.llava_sam2_rl.hooks.checkpoint_io import (
    INCOMPLETE,
    load_from_local,
    write_atomically,
)
from projects.llava_sam2_rl.registry import HOOKS

#: In a checkpoint folder, beside DeepSpeed's own files: what mmengine would have written without
#: DeepSpeed (but for the optimizer), with the trained weights in float32.
PLAIN = 'plain.pth'


def is_deepspeed(runner: Any) -> bool:
    """Whether the model lies in a DeepSpeed engine."""
    return hasattr(runner.model, 'is_gradient_accumulation_boundary')


@HOOKS.register_module()
class DeepSpeedHook(Hook):
    """Makes a run under ``--deepspeed`` do what it does without; else it does nothing.

    - The step is `DualLoopModel.train_step`, as under DDP.
    - What cannot work is refused before the first step.
    - Checkpoints are folders that appear under their names only when they are whole. mmengine's
      strategy for DeepSpeed calls no hook when it saves or loads; here they are called, so that
      the teacher and the random states are part of it.
    """

    # Before every hook that looks at the model or has something to load.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Any) -> None:
        """Wraps the engine and finishes the loading of a checkpoint.

        Raises:
            ValueError: The objective or the ZeRO stage is not supported; says why and what to do.
        """
        if not is_deepspeed(runner):
            return
        # Here, since importing DeepSpeed takes seconds.
        from projects.llava_sam2_rl.models.deepspeed import DualLoopEngine

        engine = runner.model.model
        refuse(engine)
        wrapper = DualLoopEngine(model=engine, inputs_to_half=runner.model._inputs_to_half)
        runner.model = runner.strategy.model = runner.optim_wrapper.model = wrapper
        # Every hook saves through the runner.
        runner.save_checkpoint = functools.partial(save_checkpoint, runner)
        if runner._has_loaded:
            folder = Path(runner._load_from)
            checkpoint = load_from_local(str(folder / PLAIN), map_location='cpu')
            runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
            if runner._resume:
                runner.message_hub.load_state_dict(checkpoint['message_hub'])


def refuse(engine: Any) -> None:
    """Raises ``ValueError`` for what does not work under DeepSpeed."""
    if engine.zero_optimization_stage() == 3:
        raise ValueError(
            'ZeRO-3 is not supported: it gathers the weights of each layer when all ranks run it, '
            'but ranks run different layers (rollouts of different lengths, records without a '
            'caption), so they would wait for each other for ever. Use '
            '`--deepspeed configs/deepspeed/zero2.json`'
        )
    if getattr(engine.module.objective, 'gradient_surgery', False):
        raise ValueError(
            'gradient_surgery needs the gradients of both directions apart, which DeepSpeed adds '
            'up and shares out itself: set model.objective.gradient_surgery=False, or leave '
            '--deepspeed out (DDP)'
        )


def save_checkpoint(
    runner: Any,
    out_dir: str,
    filename: str,
    file_client_args: dict | None = None,
    save_optimizer: bool = True,
    save_param_scheduler: bool = True,
    meta: dict[str, Any] | None = None,
    by_epoch: bool = True,
    backend_args: dict | None = None,
) -> None:
    """What ``FlexibleRunner.save_checkpoint`` does; to be called on every rank.

    With the optimizer it makes a folder, which appears under its name only when it is whole, and
    holds `PLAIN` besides DeepSpeed's files. Without (a best checkpoint) it makes `PLAIN` alone.

    Args: As of mmengine; ``file_client_args`` is not used.

    Raises:
        OSError: Something could not be written; what was there before under that name still is.
    """
    path = Path(out_dir) / filename
    meta = dict(meta or {})
    meta.setdefault('epoch', runner.epoch + by_epoch)
    meta.setdefault('iter', runner.iter + (not by_epoch))
    meta.update(cfg=runner.cfg.pretty_text, experiment_name=runner.experiment_name)
    if hasattr(runner.train_dataloader.dataset, 'metainfo'):
        meta.update(dataset_meta=runner.train_dataloader.dataset.metainfo)
    meta.update(seed=runner.seed)
    checkpoint = {
        'meta': meta,
        'message_hub': runner.message_hub.state_dict(),
        'state_dict': full_weights(runner.model.module),
    }
    runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    if not save_optimizer:
        if is_main_process():
            write_atomically(path, buffer.getvalue())
        return
    incomplete = path.with_name(path.name + INCOMPLETE)
    if is_main_process():
        shutil.rmtree(incomplete, ignore_errors=True)
    barrier()
    # Plain values only, since DeepSpeed pickles them; the real message hub is in `PLAIN`.
    hub: dict[str, Any] = {'log_scalars': {}, 'runtime_info': {}, 'resumed_keys': {}}
    runner.strategy.save_checkpoint(
        filename=str(incomplete),
        save_param_scheduler=save_param_scheduler,
        extra_ckpt={'meta': dict(meta), 'message_hub': hub},
    )
    if is_main_process():
        (incomplete / PLAIN).write_bytes(buffer.getvalue())
    barrier()
    if is_main_process():
        _publish(incomplete, path)
    barrier()


def full_weights(model: torch.nn.Module) -> OrderedDict[str, Tensor]:
    """The trained weights in float32 on the CPU; collective under bf16, where ranks share them."""
    from projects.llava_sam2_rl.models.teacher import full_parameter

    return OrderedDict(
        (name, full_parameter(parameter).float().cpu())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def _publish(incomplete: Path, path: Path) -> None:
    for entry in [*(p for p in incomplete.rglob('*') if p.is_file()), incomplete]:
        _to_disk(entry)
    replaced = path.with_name(f'{path.name}.replaced{INCOMPLETE}')
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    incomplete.rename(path)
    _to_disk(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
