"""`DualLoopModel` inside a DeepSpeed engine.

Apart from `distributed`, since importing DeepSpeed takes seconds that a run without it need not
spend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mmengine._strategy.deepspeed import (
    DeepSpeedOptimWrapper,
    DeepSpeedStrategy,
    MMDeepSpeedEngineWrapper,
)
from mmengine.device import get_device
from mmengine.registry import MODEL_WRAPPERS, STRATEGIES
from torch import Tensor, nn

from projects.llava_sam2_rl.engine.distributed import ordered_backward
from projects.llava_sam2_rl.engine.split_weights import SplitWeights, WholeWeights
from projects.llava_sam2_rl.engine.zero_state import gather_parameters


@STRATEGIES.register_module()
class DualLoopDeepSpeedStrategy(DeepSpeedStrategy):
    """mmengine's strategy; what the model prepares its inputs with is moved to the device as well.

    ZeRO-3 places parameters by itself, so mmengine's model is not told of the device.
    """

    def _wrap_model(self, model: nn.Module) -> MMDeepSpeedEngineWrapper:
        stage = (self.config.get('zero_optimization') or {}).get('stage', 0)
        if stage == 3 and not all(p.is_floating_point() for p in model.parameters()):
            raise ValueError(
                'model.policy.quantization and ZeRO-3, which takes weights in parts: those of 4 or '
                '8 bits have none. Use --deepspeed configs/deepspeed/zero2.json, or leave '
                'quantization out'
            )
        wrapper = super()._wrap_model(model)
        wrapper.model.module.data_preprocessor.to(get_device())
        return wrapper


@MODEL_WRAPPERS.register_module()
class DualLoopEngine(MMDeepSpeedEngineWrapper):
    """mmengine's engine wrapper with the model's own ``train_step``.

    Each update is one forward, backward and ``step`` of the engine, so that ``num_iterations``
    counts like micro-batches. A step that is skipped calls neither: for the engine it never was.

    Under ZeRO-3 each rank keeps a part of the weights that are larger than the config's persistence
    threshold, and DeepSpeed's own way of gathering them, for which all ranks would have to run the
    same layers, is replaced by `SplitWeights`. Where nothing is larger all weights are whole.

    Args:
        model: The ``DeepSpeedEngine``.
        inputs_to_half: As of mmengine's wrapper.
    """

    def __init__(self, *, model: Any, inputs_to_half: list[int | str] | None = None) -> None:
        super().__init__(model=model, inputs_to_half=inputs_to_half)
        #: Called after every optimizer step, without arguments.
        self.after_step: list[Callable[[], None]] = []
        stage = model.zero_optimization_stage()
        self._in_order = stage >= 2 or (stage == 1 and model.zero_overlap_comm())
        #: Puts together what this rank has a part of.
        self.weights = gather_on_request(model) if stage == 3 else WholeWeights()
        if isinstance(self.weights, SplitWeights):
            model.module.use_weights(self.weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The engine's forward pass."""
        with self.weights.saved_for_backward():
            return self.model(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: DeepSpeedOptimWrapper) -> dict[str, Any]:
        """`DualLoopModel.train_step`, its forward passes through the engine."""
        return self.model.module.train_step(data, optim_wrapper, wrapper=self)

    def val_step(self, data: Any) -> list:
        """mmengine's, at whose end all ranks have what they need of each other."""
        found = super().val_step(data)
        self.weights.together()
        return found

    test_step = val_step

    def backward(self, loss: Tensor) -> None:
        """The engine's ``backward``, in which all ranks exchange gradients in one order."""
        if self._in_order:
            parameters = [p for p in self.model.module.parameters() if p.requires_grad]
            loss = ordered_backward(loss, parameters, self.weights.together)
        self.model.backward(loss)

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


def gather_on_request(engine: Any) -> WholeWeights:
    """Does away with DeepSpeed's gathering layer by layer under ZeRO-3.

    Parameters below its persistence thresholds become whole. DeepSpeed itself takes them apart in
    ``step`` and when it saves, and puts them together at the end, where all ranks take part. Frozen
    ones stay together: they have not changed.

    Returns:
        What puts the others together.

    Raises:
        ValueError: Parameters that cannot be split are above the thresholds.
    """
    offload = engine.optimizer.parameter_offload
    offload._remove_module_hooks()
    parameters = list(engine.module.parameters())
    trained = [p for p in parameters if p.requires_grad and p.ds_persist]

    def take_trained_apart() -> None:
        for parameter in trained:
            parameter.partition()

    engine.optimizer._partition_all_parameters = take_trained_apart
    parts = [p for p in offload.persistent_parameters if p.ds_status.name == 'NOT_AVAILABLE']
    gather_parameters(parts)
    persistent = offload.persistent_parameters
    if persistent and torch.distributed.get_backend() == 'gloo':
        # What DeepSpeed calls after each step with all of them.
        persistent[0].all_gather = partial(_one_by_one, persistent[0], persistent[0].all_gather)
    if all(p.ds_persist for p in parameters):
        return WholeWeights()

    def master(parameter: nn.Parameter) -> Tensor:
        return engine.optimizer._get_fp32_opt_state_partition(parameter, None)[0]

    return SplitWeights(engine.module, parameters[0].device, master)


def _one_by_one(
    parameter: Any, all_gather: Callable[..., Any], parameters: Any = None, **_: Any
) -> None:
    for each in [parameter] if parameters is None else parameters:
        all_gather([each])


def refuse(engine: Any) -> None:
    """Raises ``ValueError`` for what does not work under DeepSpeed."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(engine.optimizer, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)):
        raise ValueError(
            f'the DeepSpeed config makes a {type(engine.optimizer).__name__}, whose state cannot '
            'be saved here: use ZeRO stage 1, 2 or 3 without data_types.grad_accum_dtype '
            '(configs/deepspeed/), or leave --deepspeed out (DDP)'
        )
    if engine.module.objective.gradient_surgery:
        raise ValueError(
            'gradient_surgery needs the gradients of both directions apart, which DeepSpeed adds '
            'up and shares out itself: set model.objective.gradient_surgery=False, or leave '
            '--deepspeed out (DDP)'
        )
