"""An evaluation that a kill cut short is done when the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop

from projects.llava_sam2_rl.engine.checkpoint_files import write_atomically
from projects.llava_sam2_rl.registry import HOOKS

_MARK = 'last_validation'


@HOOKS.register_module()
class ResumedValidationHook(Hook):
    """Evaluates at the start of a resumed run where the interrupted one was about to.

    mmengine evaluates after the iteration of which the checkpoint was written, and a resumed run
    begins with the next: a run killed in its last evaluation would never have one. The iteration
    of the last finished evaluation is kept in ``<work_dir>/last_validation``, so that none is done
    twice. For loops that count iterations; those that count epochs are left alone.
    """

    def after_val(self, runner: Any) -> None:
        """Notes that this evaluation is done."""
        if is_main_process():
            write_atomically(Path(runner.work_dir) / _MARK, f'{runner.iter}\n'.encode())

    def before_train_epoch(self, runner: Any) -> None:
        """Makes up for the evaluation of the iteration that the run resumes from."""
        loop = runner.train_loop
        # Only a resumed run begins elsewhere than at 0.
        if loop.iter == 0 or runner.val_loop is None or not isinstance(loop, IterBasedTrainLoop):
            return
        loop._decide_current_val_interval()
        due = loop.iter % loop.val_interval == 0 or loop.iter == loop.max_iters
        if not due or loop.iter < loop.val_begin:
            return
        mark = Path(runner.work_dir) / _MARK
        # Rank 0 decides, for folders that not all nodes share.
        done = [mark.is_file() and mark.read_text().strip() == str(loop.iter)]
        broadcast_object_list(done)
        if done[0]:
            return
        runner.logger.info(f'Making up for the evaluation after iteration {loop.iter}')
        runner.val_loop.run()
