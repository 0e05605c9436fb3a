"""Where an optimizer step of several iterations stands, with DeepSpeed and without."""

from __future__ import annotations

from typing import Any

from projects.llava_sam2_rl.engine.deepspeed_runner import is_deepspeed


def accumulative_counts(runner: Any) -> int:
    """Iterations of which each optimizer step takes the gradients."""
    if is_deepspeed(runner):
        return runner.model.gradient_accumulation_steps()
    return runner.optim_wrapper._accumulative_counts


def step_is_complete(runner: Any) -> bool:
    """Whether no gradients wait for the rest of an optimizer step; after an iteration."""
    if is_deepspeed(runner):
        return runner.model.micro_steps % runner.model.gradient_accumulation_steps() == 0
    return runner.optim_wrapper.should_update()
