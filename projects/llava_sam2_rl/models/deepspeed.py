"""`DualLoopModel` inside a DeepSpeed engine.

Apart from `distributed`, since importing DeepSpeed takes seconds that a run without it need not
spend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper, MMDeepSpeedEngineWrapper
from mmengine.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class DualLoopEngine(MMDeepSpeedEngineWrapper):
    """mmengine's engine wrapper with the model's own ``train_step``.

    Each update is one forward, backward and ``step`` of the engine, so that ``num_iterations``
    counts like micro-batches. A step that is skipped calls neither: for the engine it never was.

    Args:
        model: The ``DeepSpeedEngine``.
        inputs_to_half: As of mmengine's wrapper.
    """

    def __init__(self, *, model: Any, inputs_to_half: list[int | str] | None = None) -> None:
        super().__init__(model=model, inputs_to_half=inputs_to_half)
        #: Called after every optimizer step, without arguments.
        self.after_step: list[Callable[[], None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The engine's forward pass."""
        return self.model(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: DeepSpeedOptimWrapper) -> dict[str, Any]:
        """`DualLoopModel.train_step`, its forward passes through the engine."""
        return self.model.module.train_step(data, optim_wrapper, wrapper=self)

    def step(self) -> None:
        """The engine's ``step``; at the end of an accumulation also what waits for it."""
        before = self.optimizer_steps
        self.model.step()
        if self.optimizer_steps > before:
            for callback in self.after_step:
                callback()

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps taken; the engine's own count has those skipped for overflow too."""
        return self.model.global_steps - self.model.skipped_steps
