"""Checkpoints that survive a kill at any moment, and resumed runs that equal uninterrupted ones."""

from __future__ import annotations

import os
import os.path as osp
from collections import deque
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import IterBasedTrainLoop, find_latest_checkpoint

from projects.llava_sam2_rl.engine.accumulation import accumulative_counts
from projects.llava_sam2_rl.engine.checkpoint_files import (
    ATOMIC_BACKEND,
    INCOMPLETE,
    DeferredRemoval,
    check_loaded,
    log_scalars_from_plain,
    plain_message_hub,
    write_atomically,
)
from projects.llava_sam2_rl.engine.random_state import (
    CallBeforeNewBatch,
    get_random_state,
    set_random_state,
)
from projects.llava_sam2_rl.registry import HOOKS

_RANDOM_STATES = 'random_states'


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, made safe against kills and exact on resume.

    - A checkpoint, and ``last_checkpoint``, appear under their names only when they are whole on
      disk. ``last_checkpoint`` is written after the checkpoint it names. Half-written files of a
      killed run are removed at the next start.
    - An old checkpoint is removed only after the new one is whole (the stock hook removes first).
    - The random states of every rank are saved and put back right before the first batch of a
      resumed run is fetched, and validation leaves them as they were; so a resumed run repeats
      the uninterrupted one bit for bit. Data whose randomness lives in dataloader *workers* is
      repeated within the first pass over the data only: draw it from the sample's index, or use
      ``InfiniteSampler``.
    - A checkpoint of another model is refused before anything of it is loaded.

    Under DeepSpeed a checkpoint is such a file too (see `DeepSpeedHook`).

    Args: As of ``mmengine.hooks.CheckpointHook``, which documents them.
    """

    # Set by the stock hook's `before_train`.
    file_backend: Any
    keep_ckpt_ids: deque[int]
    last_ckpt: str | None

    # The arguments are spelled out so that a misspelled one is an error when the hook is built;
    # the stock hook takes any and fails at the first save.
    def __init__(
        self,
        interval: int = -1,
        by_epoch: bool = True,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        out_dir: str | Path | None = None,
        max_keep_ckpts: int = -1,
        save_last: bool = True,
        save_best: str | list[str] | None = None,
        rule: str | list[str] | None = None,
        greater_keys: list[str] | None = None,
        less_keys: list[str] | None = None,
        filename_tmpl: str | None = None,
        backend_args: dict | None = None,
        published_keys: str | list[str] | None = None,
        save_begin: int = 0,
    ) -> None:
        # A path like s3://… has a backend of its own, which replaces whole objects anyway.
        if backend_args is None and '://' not in str(out_dir):
            backend_args = {'backend': ATOMIC_BACKEND}
        super().__init__(
            interval=interval,
            by_epoch=by_epoch,
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler,
            out_dir=out_dir,
            max_keep_ckpts=max_keep_ckpts,
            save_last=save_last,
            save_best=save_best,
            rule=rule,
            greater_keys=greater_keys,
            less_keys=less_keys,
            filename_tmpl=filename_tmpl,
            backend_args=backend_args,
            published_keys=published_keys,
            save_begin=save_begin,
        )
        self._state_before_val: dict[str, Any] | None = None
        self._states_to_save: list[dict[str, Any]] | None = None
        self._state_to_restore: dict[str, Any] | None = None

    # ---- loading

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Checks the checkpoint and keeps its random state for the start of the training loop."""
        check_loaded(runner, checkpoint)
        if 'message_hub' in checkpoint:
            log_scalars_from_plain(checkpoint['message_hub'])
        if not runner._resume:
            return
        states = checkpoint.get(_RANDOM_STATES)
        if states is None or len(states) != get_world_size():
            held = 'no random state' if states is None else f'random states of {len(states)} ranks'
            runner.logger.warning(
                f'The checkpoint holds {held} and this run has {get_world_size()}: it goes on '
                'from the seed, and will not repeat the uninterrupted run exactly'
            )
            return
        self._state_to_restore = states[get_rank()]

    def before_train(self, runner: Any) -> None:
        """Removes what a killed run left half-written and prepares the exact continuation."""
        super().before_train(runner)
        if is_main_process():
            for folder in {str(self.out_dir), runner.work_dir}:
                for leftover in sorted(Path(folder).glob(f'*{INCOMPLETE}')):
                    runner.logger.info(f'Removing {leftover}, which a killed run left unfinished')
                    _remove(self.file_backend, str(leftover))
        self._warn_of_split_steps(runner)
        loop = runner.train_loop
        if self._state_to_restore is not None and isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = CallBeforeNewBatch(
                loop, num_seen=loop.iter, callback=self._restore
            )

    def before_train_epoch(self, runner: Any) -> None:
        """Puts the random state back in an epoch-based loop, which skips no batches."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            self._restore()

    def _restore(self) -> None:
        if self._state_to_restore is not None:
            set_random_state(self._state_to_restore)
            self._state_to_restore = None

    def _warn_of_split_steps(self, runner: Any) -> None:
        counts = accumulative_counts(runner)
        if not self.by_epoch and self.interval > 0 and self.interval % counts:
            runner.logger.warning(
                f'Checkpoints every {self.interval} iterations fall between optimizer steps '
                f'(every {counts} iterations): gradients accumulated so far are not saved. Make '
                'the interval a multiple of accumulative_counts'
            )

    # ---- validation draws random numbers of its own

    def before_val(self, runner: Any) -> None:
        """Remembers the random state of the training loop."""
        self._state_before_val = get_random_state()

    def after_val(self, runner: Any) -> None:
        """Puts it back, so that training does not depend on when validation ran."""
        if self._state_before_val is not None:
            set_random_state(self._state_before_val)
            self._state_before_val = None

    # ---- saving

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Adds the random states of all ranks, and leaves only plain values in the checkpoint."""
        plain_message_hub(checkpoint['message_hub'])
        if self._states_to_save is not None:
            checkpoint[_RANDOM_STATES] = self._states_to_save

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        kept = []
        if self.max_keep_ckpts > 0:
            kept = list(self.keep_ckpt_ids)
            if not kept or kept[-1] != step:
                kept.append(step)
            # The checkpoint names those about to be removed as well: a run that is killed before
            # it removes them does so when it is resumed (mmengine's `before_train`).
            runner.message_hub.update_info('keep_ckpt_ids', kept)

        self._write(runner, self.filename_tmpl.format(step), meta)

        if self.max_keep_ckpts > 0:
            outdated = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids = deque(kept[-self.max_keep_ckpts :], self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            if is_main_process():
                for old in outdated:
                    _remove(
                        self.file_backend,
                        self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)),
                    )

    def save_now(self, runner: Any) -> str:
        """Saves after the iteration, whatever the interval; to be called on all ranks.

        In a hook's ``after_train_iter``, or in the evaluation that follows the iteration. The
        checkpoint is ``iter_N.pth``. A run in epochs that resumes from it begins the epoch
        anew, since mmengine can resume those between epochs only.

        Returns:
            Path of the checkpoint; the one of this iteration where it has been saved already.
        """
        # The loop counts an iteration after its hooks and before its evaluation.
        in_evaluation = self._state_before_val is not None
        step = runner.iter if in_evaluation else runner.iter + 1
        filename = f'iter_{step}.pth'
        path = self.file_backend.join_path(self.out_dir, filename)
        if self.last_ckpt == path:
            return path
        meta = dict(epoch=runner.epoch, iter=step)
        if self.by_epoch or filename != self.filename_tmpl.format(step):
            self._write(runner, filename, meta)
        else:
            self._save_checkpoint_with_step(runner, step, meta)
        return path

    def _write(self, runner: Any, filename: str, meta: dict) -> None:
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)

        # Validation is under way when a new best score is saved; the loop goes on from before it,
        # which in a run just resumed is the state that has yet to be put back.
        state = self._state_to_restore or self._state_before_val or get_random_state()
        self._states_to_save = all_gather_object(state)
        try:
            runner.save_checkpoint(
                self.out_dir,
                filename,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
            )
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            whole = find_latest_checkpoint(runner.work_dir) or 'there is none yet'
            runner.logger.error(
                f'{filename} was not written ({reason}), and the run stops. The '
                f'last whole checkpoint: {whole}. Free some space, or keep fewer (checkpoint '
                'max_keep_ckpts), then go on with --resume auto'
            )
            raise
        finally:
            self._states_to_save = None
        if is_main_process():
            write_atomically(osp.join(runner.work_dir, 'last_checkpoint'), self.last_ckpt.encode())

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        # The stock method removes the previous best first; here it does so at the end.
        backend = self.file_backend
        deferring = DeferredRemoval(backend)
        self.file_backend = deferring
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        for path in deferring.to_remove:
            _remove(backend, path)


def _remove(backend: Any, path: str) -> None:
    if backend.isfile(path):
        backend.remove(path)
