"""DeepSpeed under the same hooks: the model's own step, and the same checkpoints."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook

from projects.llava_sam2_rl.engine.checkpoint_files import check_loaded
from projects.llava_sam2_rl.engine.deepspeed_runner import (
    is_deepspeed,
    optimizer_without_deepspeed,
    wrap,
)
from projects.llava_sam2_rl.registry import HOOKS


@HOOKS.register_module()
class DeepSpeedHook(Hook):
    """Makes a run under ``--deepspeed`` do what it does without; else it does next to nothing.

    - The step is `DualLoopModel.train_step`, as under DDP.
    - What cannot work is refused before the first step.

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

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Gives a plain optimizer its state out of a checkpoint written under DeepSpeed."""
        if runner._resume and not is_deepspeed(runner):
            check_loaded(runner, checkpoint)  # which says more than an optimizer that does not fit
            optimizer_without_deepspeed(runner, checkpoint)
