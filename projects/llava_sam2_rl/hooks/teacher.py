"""Moves the teacher after every optimizer step and keeps it in checkpoints."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper

from projects.llava_sam2_rl.engine.checkpoint_files import check_loaded
from projects.llava_sam2_rl.engine.deepspeed_runner import is_deepspeed
from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.registry import HOOKS

_KEY = 'teacher'


@HOOKS.register_module()
class EMATeacherHook(Hook):
    """Calls ``model.update_teacher()`` once per optimizer step, and saves and loads the teacher.

    The model under training has ``teacher`` (an ``EMATeacher``), ``policy`` (the module it follows)
    and ``update_teacher()``. Steps are counted on the optimizer itself, so that gradient
    accumulation, several steps in one iteration (``num_iterations`` > 1) and steps that mixed
    precision skips are followed exactly, under DeepSpeed as well (with `DeepSpeedHook`).

    A run starts with the teacher equal to the policy, unless its checkpoint holds a teacher.

    Args:
        decay: EMA decay, between 0 and 1, in place of the one that the model's teacher was built
            with. Defaults to ``None``, which keeps that one.

    Raises:
        ValueError: ``decay`` is outside [0, 1].
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0.0 <= decay <= 1.0:
            raise ValueError(f'decay must be between 0 and 1, got {decay}')
        self.decay = decay
        self._restored = False
        self._handle: Any = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Loads the teacher where the checkpoint has one."""
        # Hooks run by priority; a checkpoint of another model must not reach the teacher either.
        check_loaded(runner, checkpoint)
        if _KEY in checkpoint:
            unwrapped(runner).teacher.load_state_dict(checkpoint[_KEY])
            self._restored = True

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Stores the teacher's float32 shadows, on the CPU as the other tensors."""
        state = unwrapped(runner).teacher.state_dict()
        state['shadows'] = {name: t.cpu() for name, t in state['shadows'].items()}
        checkpoint[_KEY] = state

    def before_train(self, runner: Any) -> None:
        """Starts the teacher at the policy where nothing was loaded, and begins to follow steps."""
        model = unwrapped(runner)
        if self.decay is not None:
            model.teacher.decay = self.decay
        if not self._restored:
            model.teacher.copy_from(model.policy)
            if runner._resume or runner._load_from is not None:
                runner.logger.warning(
                    'The checkpoint holds no teacher: it starts as a copy of the loaded policy'
                )
        if is_deepspeed(runner):
            runner.model.after_step.append(model.update_teacher)
            return
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            raise TypeError(
                'EMATeacherHook follows one optimizer, got '
                f'{type(runner.optim_wrapper).__name__}; use a single optim_wrapper'
            )
        self._handle = runner.optim_wrapper.optimizer.register_step_post_hook(
            lambda *_: model.update_teacher()
        )

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Logs the decay and the number of updates."""
        model = unwrapped(runner)
        runner.message_hub.update_scalar('train/teacher/decay', model.teacher.decay)
        runner.message_hub.update_scalar('train/teacher/updates', model.teacher.num_updates)

    def after_train(self, runner: Any) -> None:
        """Stops following the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
