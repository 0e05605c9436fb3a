"""DeepSpeed under the same hooks: the model's own step, and the same checkpoints."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook

from projects.llava_sam2_rl.engine.checkpoint_files import check_loaded
from projects.llava_sam2_rl.engine.deepspeed_runner import (
    is_deepspeed,
    optimizer_without_deepspeed,
    wrap,
)
from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.engine.split_weights import SplitWeights
from projects.llava_sam2_rl.preflight.launcher import local_processes
from projects.llava_sam2_rl.preflight.memory import MARGIN, fits_whole, predict_rollout, sizes_of
from projects.llava_sam2_rl.registry import HOOKS


@HOOKS.register_module()
class DeepSpeedHook(Hook):
    """Makes a run under ``--deepspeed`` do what it does without; else it does next to nothing.

    - The step is `DualLoopModel.train_step`, as under DDP.
    - What cannot work is refused before the first step.
    - Under ZeRO-3 with weights in parts the model is told how to decode, where
      ``model.gather_for_rollout`` does not say; the choice is logged.

    Checkpoints are those of a run without (see `engine.deepspeed_runner`). A run without DeepSpeed
    that resumes from one of its checkpoints gets the optimizer's state here.
    """

    # Before every hook that looks at the model or has something to load.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Any) -> None:
        """Wraps the engine.

        Raises:
            ValueError: The objective or the ZeRO config is not supported; says why and what to do.
        """
        if is_deepspeed(runner):
            wrap(runner)
            choose_way_to_decode(runner)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Gives a plain optimizer its state out of a checkpoint written under DeepSpeed."""
        if runner._resume and not is_deepspeed(runner):
            check_loaded(runner, checkpoint)  # which says more than an optimizer that does not fit
            optimizer_without_deepspeed(runner, checkpoint)


def choose_way_to_decode(runner: Any) -> None:
    """Sets ``gather_for_rollout`` where it is None and there are weights in parts.

    All ranks choose alike, by the smallest of their GPUs.

    Args:
        runner: Its model is in the engine.
    """
    weights, model = runner.model.weights, unwrapped(runner)
    if not isinstance(weights, SplitWeights) or model.gather_for_rollout is not None:
        return
    sizes = sizes_of(model.policy, runner.cfg, is_small=lambda p: not weights.is_split(p))
    smallest = torch.tensor(memory_of_a_rank(), dtype=torch.float64, device=weights.device)
    all_reduce(smallest, 'min')
    ranks, room = get_world_size(), float(smallest)
    model.gather_for_rollout = fits_whole(sizes, ranks, room)
    needed = sum(predict_rollout(sizes, ranks).values())
    way = 'is put together for each rollout' if model.gather_for_rollout else 'stays in parts'
    runner.logger.info(
        f'ZeRO-3: the language model {way} (gather_for_rollout={model.gather_for_rollout}): with '
        f'it rollouts take about {needed / 1e9:.1f} GB of {(room - MARGIN) / 1e9:.1f} GB'
    )


def memory_of_a_rank() -> int:
    """Bytes of this rank's GPU; without one, its share of the machine's memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return int(psutil.virtual_memory().total // local_processes(os.environ))
