"""A run that stands still says where and ends, instead of blocking its machines for days."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import Hook

from projects.llava_sam2_rl.registry import HOOKS

#: Exit status of a run that the watchdog ended, as of the command ``timeout``.
TIMEOUT_EXIT_CODE = 124


@HOOKS.register_module()
class WatchdogHook(Hook):
    """Ends a process whose step, checkpoint or evaluation takes too long.

    All threads' stacks go to ``<work_dir>/watchdog_rank<N>.txt`` and to stderr, then a message
    that names the rank, the phase and the limit, then the process ends with status 124. Ranks that
    wait for the one that stands still run into their own limits at the same time, so there is a
    file of each.

    A thread watches; it sleeps until the limit. Should the interpreter itself be blocked (a
    library that never releases the lock), ``faulthandler`` ends the process from outside of it,
    ``grace`` seconds later.

    Args:
        timeout: Limit in seconds of one iteration: waiting for its data, the step, and all other
            hooks. ``None`` for no limit, as for each of the others. Defaults to 1800.
        first_timeout: Limit in seconds of the first iteration of a run, which compiles, warms up
            and, on resume, runs through the data that was seen already. Defaults to 3600.
        checkpoint_timeout: Limit in seconds of writing one checkpoint. Defaults to 1800.
        evaluation_timeout: Limit in seconds of one batch of an evaluation, and of its metrics at
            the end. Defaults to 1800.
        grace: Seconds between a dump and the end, so that other ranks get to write theirs.
            Defaults to 5.

    Raises:
        ValueError: A limit is not positive.
    """

    # First in every iteration, so that the time other hooks take counts.
    priority = 'HIGHEST'

    def __init__(
        self,
        timeout: float | None = 1800,
        first_timeout: float | None = 3600,
        checkpoint_timeout: float | None = 1800,
        evaluation_timeout: float | None = 1800,
        grace: float = 5,
    ) -> None:
        self.limits = {
            'first iteration': first_timeout,
            'iteration': timeout,
            'checkpoint': checkpoint_timeout,
            'evaluation': evaluation_timeout,
        }
        for phase, limit in self.limits.items():
            if limit is not None and limit <= 0:
                raise ValueError(f'the limit of the {phase} must be positive or None, got {limit}')
        self.grace = grace
        self._watch: _Watch | None = None
        self._phase = ''
        self._completed = 0
        self._save: Callable | None = None

    def before_train(self, runner: Any) -> None:
        """Starts watching; saving is watched where it happens, DeepSpeed's too."""
        path = Path(runner.work_dir) / f'watchdog_rank{get_rank()}.txt'
        self._watch = _Watch(path, self.grace)
        self._completed = runner.iter
        self._enter('first iteration')
        save = self._save = runner.save_checkpoint

        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            with self._inside('checkpoint'):
                return save(*args, **kwargs)

        runner.save_checkpoint = save_checkpoint

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """An iteration has ended in time, and the next begins."""
        self._completed = runner.iter + 1  # the loop counts it after the hooks
        self._enter('iteration')

    def before_val(self, runner: Any) -> None:
        """Watches the evaluation batch by batch."""
        self._enter('evaluation')

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """The next batch."""
        self._enter('evaluation')

    def after_val(self, runner: Any) -> None:
        """Back to the training."""
        self._enter('iteration')

    def after_train(self, runner: Any) -> None:
        """Stops watching."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
            runner.save_checkpoint = self._save

    def _enter(self, phase: str) -> None:
        # An evaluation outside of training has no watch.
        if self._watch is not None:
            self._phase = phase
            limit = self.limits[phase]
            self._watch.start(limit, f'the {phase} after iteration {self._completed}')

    @contextmanager
    def _inside(self, phase: str) -> Iterator[None]:
        before = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)


class _Watch:
    """One deadline at a time, and the thread that waits for it."""

    def __init__(self, path: Path, grace: float) -> None:
        self._path = path
        self._grace = grace
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._limit = 0.0
        self._doing = ''
        self._stopped = False
        # The original one, which has a file descriptor whatever stands in for it.
        self._stderr = sys.__stderr__
        threading.Thread(target=self._run, name='watchdog', daemon=True).start()

    def start(self, limit: float | None, doing: str) -> None:
        """Sets the deadline ``limit`` seconds from now; with ``None`` there is none."""
        with self._changed:
            earlier = self._deadline
            self._deadline = None if limit is None else time.monotonic() + limit
            self._limit, self._doing = limit or 0.0, doing
            # A thread that wakes too early sleeps on; only one that would wake too late is woken.
            if self._deadline is not None and (earlier is None or self._deadline < earlier):
                self._changed.notify()
        if limit is None:
            faulthandler.cancel_dump_traceback_later()
        elif self._stderr is not None:
            faulthandler.dump_traceback_later(
                limit + 2 * self._grace + 1, exit=True, file=self._stderr
            )

    def stop(self) -> None:
        """Ends the watch."""
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._stopped:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            else:
                return
            message = (
                f'watchdog: rank {get_rank()} on {socket.gethostname()} (process {os.getpid()}): '
                f'{self._doing} has taken more than {self._limit:g} s. '
                f'The stacks of all threads are in {self._path}. If it is merely slow, raise the '
                'limit in WatchdogHook(...)'
            )
        # The file system may be what hangs, so stderr comes first.
        if self._stderr is not None:
            print(f'{message}:', file=self._stderr, flush=True)
            faulthandler.dump_traceback(self._stderr, all_threads=True)
        try:
            with open(self._path, 'w') as file:
                print(f'{time.strftime("%F %T")} {message}:\n', file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            message = f'watchdog: {error}; {message}'
        time.sleep(self._grace)
        if self._stderr is not None:
            print(f'{message}. The process ends.', file=self._stderr, flush=True)
        os._exit(TIMEOUT_EXIT_CODE)
