"""mmengine's runner for DeepSpeed, with the checkpoints of the other runs.

A checkpoint is one file with weights, teacher and optimizer state whole and by name, instead of a
folder of every rank's shares: it can be written atomically, and any number of ranks, another ZeRO
stage, and a run without DeepSpeed can go on from it. Hooks are called when it is saved and loaded,
which mmengine's strategy for DeepSpeed leaves out.

DeepSpeed itself is imported in the functions that need it: that takes seconds.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner import FlexibleRunner

from projects.llava_sam2_rl.engine.checkpoint_files import load_from_local, write_atomically
from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.engine.split_weights import SplitWeights
from projects.llava_sam2_rl.utils.errors import CheckpointError

#: Weights in a checkpoint folder (an earlier layout; `export` reads it).
PLAIN = 'plain.pth'
#: In a checkpoint written under DeepSpeed: the optimizer's state by parameter name.
OPTIMIZER = 'named_optimizer'


def is_deepspeed(runner: Any) -> bool:
    """Whether the run was started with ``--deepspeed``, for which xtuner takes this runner."""
    return isinstance(runner, FlexibleRunner)


def wrap(runner: Any) -> None:
    """Puts `DualLoopEngine` in the place of mmengine's wrapper, once.

    Raises:
        ValueError: The objective or the ZeRO config is not supported; says why and what to do.
    """
    from projects.llava_sam2_rl.engine.deepspeed import DualLoopEngine, refuse

    if isinstance(runner.model, DualLoopEngine):
        return
    engine = runner.model.model
    refuse(engine)
    wrapper = DualLoopEngine(model=engine, inputs_to_half=runner.model._inputs_to_half)
    runner.model = runner.strategy.model = runner.optim_wrapper.model = wrapper
    if isinstance(wrapper.weights, SplitWeights):
        check_even_batches(runner.cfg)


def check_even_batches(cfg: Mapping[str, Any]) -> None:
    """Ranks that hold weights in parts have to go through validation together, batch by batch.

    Raises:
        ValueError: A sampler gives ranks different numbers of batches.
    """
    for key in ('val_dataloader', 'test_dataloader'):
        sampler = (cfg.get(key) or {}).get('sampler')
        if isinstance(sampler, Mapping) and not sampler.get('round_up', True):
            raise ValueError(
                f'{key}.sampler.round_up=False gives ranks different numbers of batches, and under '
                'ZeRO-3 with weights in parts one would wait for the others: set it to True'
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
    """Saves; to be called on every rank.

    Args: As of mmengine; ``file_client_args`` and ``backend_args`` are not used.

    Raises:
        OSError: It could not be written; what was there before under that name still is.
    """
    from projects.llava_sam2_rl.engine.zero_state import full_weights, optimizer_state

    # Copied as the stock runner of other launchers does it.
    meta = dict(meta or {})
    if by_epoch:
        meta.setdefault('epoch', runner.epoch + 1)
        meta.setdefault('iter', runner.iter)
    else:
        meta.setdefault('epoch', runner.epoch)
        meta.setdefault('iter', runner.iter + 1)
    meta.update(
        cfg=runner.cfg.pretty_text, experiment_name=runner.experiment_name, seed=runner.seed
    )
    if hasattr(runner.train_dataloader.dataset, 'metainfo'):
        meta.update(dataset_meta=runner.train_dataloader.dataset.metainfo)
    main = is_main_process()
    checkpoint: dict[str, Any] = {
        'meta': meta,
        'message_hub': runner.message_hub.state_dict(),
        'state_dict': full_weights(runner.model.module, keep=main),
    }
    if save_optimizer:
        checkpoint[OPTIMIZER] = optimizer_state(runner.model.model, keep=main)
    if save_param_scheduler and runner.param_schedulers is not None:
        checkpoint['param_schedulers'] = runner.strategy.scheduler_state_dict()
    runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)
    if main:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(out_dir) / filename, buffer.getvalue())
    barrier()


def resume(
    runner: Any,
    filename: str,
    resume_optimizer: bool = True,
    resume_param_scheduler: bool = True,
    map_location: Any = 'default',
) -> None:
    """Goes on from a checkpoint of any launcher, number of ranks and ZeRO stage.

    Raises:
        CheckpointError: It is of another model, damaged, or without optimizer state.
    """
    from projects.llava_sam2_rl.engine import zero_state

    checkpoint = _load_weights(runner, filename)
    engine = runner.model.model
    if resume_optimizer:
        if OPTIMIZER in checkpoint:
            state = checkpoint[OPTIMIZER]
        elif 'optimizer' in checkpoint:
            named = list(engine.module.named_parameters())
            state = zero_state.by_name(checkpoint['optimizer'], named)
        else:
            raise CheckpointError(
                f'{filename} holds no optimizer state: resume from another checkpoint, or give '
                'it as `load_from` to start from its weights'
            )
        zero_state.load_optimizer_state(engine, state)
    if resume_param_scheduler and runner.param_schedulers is not None:
        runner.strategy.load_scheduler_state_dict(checkpoint['param_schedulers'])
    runner.train_loop._epoch = checkpoint['meta']['epoch']
    runner.train_loop._iter = checkpoint['meta']['iter']
    runner.message_hub.load_state_dict(checkpoint['message_hub'])
    runner.logger.info(f'resumed epoch: {runner.epoch}, iter: {runner.iter}')


def load_checkpoint(
    runner: Any,
    filename: str,
    map_location: Any = 'cpu',
    strict: bool = False,
    revise_keys: Any = None,
) -> None:
    """Starts from the weights of a checkpoint."""
    _load_weights(runner, filename)


def optimizer_without_deepspeed(runner: Any, checkpoint: dict[str, Any]) -> None:
    """Gives a plain optimizer its state out of a checkpoint written under DeepSpeed, in place."""
    from projects.llava_sam2_rl.engine.zero_state import by_index

    if OPTIMIZER in checkpoint:
        checkpoint['optimizer'] = by_index(
            checkpoint[OPTIMIZER], runner.optim_wrapper.optimizer, unwrapped(runner)
        )


def _load_weights(runner: Any, filename: str) -> dict[str, Any]:
    from projects.llava_sam2_rl.engine.zero_state import load_weights

    wrap(runner)
    checkpoint = load_from_local(filename, map_location='cpu')
    runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
    wrapper = runner.model
    load_weights(wrapper.model, checkpoint.get('state_dict', checkpoint), wrapper.weights)
    return checkpoint


# `xtuner train --deepspeed` chooses this class before it imports anything of this package, and it
# resumes before any method of a hook is called.
FlexibleRunner.save_checkpoint = save_checkpoint
FlexibleRunner.resume = resume
FlexibleRunner.load_checkpoint = load_checkpoint
