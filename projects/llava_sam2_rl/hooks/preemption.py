"""SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint after the step, and an exit code that says which."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier
from mmengine.hooks import Hook

from projects.llava_sam2_rl.engine.accumulation import step_is_complete
from projects.llava_sam2_rl.hooks.checkpoint import AtomicCheckpointHook
from projects.llava_sam2_rl.registry import HOOKS

#: Exit status of a run that was asked to stop and has saved: start it again with ``--resume auto``.
#: The number of Linux's ERESTART ("interrupted system call should be restarted"), which HTCondor
#: uses for the same purpose; no shell, Python or Slurm gives it a meaning of its own.
#: ``tools/train.py`` and ``tools/slurm_train.sh`` know it too.
REQUEUE_EXIT_CODE = 85
#: Exit status after Ctrl-C, as of every command that one ends. Nobody starts such a run again.
INTERRUPT_EXIT_CODE = 128 + signal.SIGINT
# A launcher may hand on the Ctrl-C that its processes had from the terminal already.
_SAME_PRESS = 0.5


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Saves and exits when the cluster wants the machine back, or the user does (Ctrl-C).

    A signal on any rank is enough: after the iteration (of training or evaluation) in which it
    came all ranks agree, the run's `AtomicCheckpointHook` writes a checkpoint, and every rank
    exits with ``exit_code``. With gradient accumulation the run goes on to the end of the
    optimizer step, since gradients are not saved.

    Schedulers signal every process of a job, a terminal every process of a command. The data
    loading workers of this project's loops leave that to the training process
    (`engine.worker_processes`).

    Ctrl-C is SIGINT: the exit status is then 130, and the last line is the command that goes on. A
    second one ends the run at once, with what the last checkpoint has.

    Args:
        exit_code: Exit status of a run that stopped this way, in 1..125.
            ``tools/slurm_train.sh`` requeues on 85. Defaults to 85.
        signals: Names of the signals to obey. Defaults to SIGTERM, SIGUSR1 and SIGINT.

    Raises:
        ValueError: A signal has no such name or cannot be handled, or the exit code is not in
            1..125 (above, shells report signals).
    """

    # After everything that belongs to the iteration, a checkpoint that is due anyway included.
    priority = 'LOWEST'

    def __init__(
        self,
        exit_code: int = REQUEUE_EXIT_CODE,
        signals: Sequence[str] = ('SIGTERM', 'SIGUSR1', 'SIGINT'),
    ) -> None:
        if not 1 <= exit_code <= 125:
            raise ValueError(f'exit_code must lie in 1..125, got {exit_code}')
        unknown = [n for n in signals if n not in signal.Signals.__members__ or n == 'SIGKILL']
        if unknown:
            raise ValueError(f'signals that cannot be handled: {", ".join(unknown)}')
        self.exit_code = exit_code
        self.signals = [signal.Signals[name] for name in signals]
        self._received = 0
        self._interrupted = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def before_train(self, runner: Any) -> None:
        """Begins to listen."""
        self._received, self._interrupted = 0, 0.0
        for signum in self.signals:
            self._previous[signum] = signal.signal(signum, self._note)

    def after_train(self, runner: Any) -> None:
        """Puts back what was there before."""
        self._stop_listening()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Stops the run if a rank was asked to."""
        if step_is_complete(runner):
            self._stop_if_asked(runner, f'iteration {runner.iter + 1}')

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Stops an evaluation in the middle of the training; a resumed run makes up for it."""
        if self._previous:
            self._stop_if_asked(runner, f'iteration {runner.iter}, in its evaluation')

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # No logger and no file here: the interrupted code may hold their locks.
        self._received = signum
        if signum != signal.SIGINT:
            return
        now, before = time.monotonic(), self._interrupted
        if before and now - before > _SAME_PRESS:
            os.write(2, b'Ctrl-C again: ended at once; the last checkpoint is what there is\n')
            os._exit(INTERRUPT_EXIT_CODE)
        if not before:
            self._interrupted = now
            if os.environ.get('LOCAL_RANK', '0') == '0':
                os.write(2, b'Ctrl-C: the run saves after this step and ends; again: at once\n')

    def _stop_if_asked(self, runner: Any, where: str) -> None:
        received = torch.tensor(float(self._received))
        all_reduce(received, op='max')
        if not received:
            return
        name = signal.Signals(int(received)).name
        saver = next((h for h in runner.hooks if isinstance(h, AtomicCheckpointHook)), None)
        command = ''
        if saver is None:
            saved = 'no checkpoint was written: the run has no AtomicCheckpointHook'
        else:
            checkpoint = saver.save_now(runner)
            saved = f'saved {checkpoint}; `--resume auto` goes on from it'
            if name == 'SIGINT':
                command = f'\nGo on with:\n  {resume_command(checkpoint)}'
        # A launcher that sees one rank exit may end the others, and one of them is writing.
        barrier()
        self._stop_listening()
        code = INTERRUPT_EXIT_CODE if name == 'SIGINT' else self.exit_code
        runner.logger.warning(
            f'{name}: the run stops after {where} with exit code {code}; {saved}{command}'
        )
        runner.visualizer.close()
        raise SystemExit(code)

    def _stop_listening(self) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
        self._previous.clear()


def resume_command(checkpoint: str) -> str:
    """The command that goes on from a checkpoint, as this process was started.

    Args:
        checkpoint: Its path, which `xtuner train` wants; this project's launcher finds it.
    """
    script, *given = sys.argv
    arguments: list[str] = []
    for n, argument in enumerate(given):
        is_value = n > 0 and given[n - 1] == '--resume' and not argument.startswith('--')
        if argument.partition('=')[0] != '--resume' and not is_value:
            arguments.append(argument)
    resume = ['--resume', 'auto']
    elastic = 'TORCHELASTIC_RUN_ID' in os.environ
    processes = os.environ.get('LOCAL_WORLD_SIZE', '1')
    if Path(script).parts[-3:-1] == ('xtuner', 'tools'):
        start = ['xtuner', Path(script).stem]
        resume = ['--resume', checkpoint]
        if elastic:
            start.insert(0, f'NPROC_PER_NODE={processes}')
            arguments = arguments[:-2]  # `--launcher pytorch`, which xtuner adds itself
    elif elastic:
        start = ['torchrun', '--nproc_per_node', processes, script]
    elif 'SLURM_PROCID' in os.environ:
        start = ['srun', 'python', script]
    else:
        start = ['python', script]
    return shlex.join([*start, *arguments, *resume])
