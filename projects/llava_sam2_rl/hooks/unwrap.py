"""The model under training without what a distributed run wraps around it."""

from __future__ import annotations

from typing import Any

from mmengine.model import is_model_wrapper


def unwrapped(runner: Any) -> Any:
    """``runner.model``, out of its DDP or DeepSpeed wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
