"""Processes of data loading workers, which leave signals to the training process."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.context import ForkContext, ForkProcess

#: What schedulers send to all processes of a job, and a terminal (Ctrl-C) to all of a command.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class WorkerProcess(ForkProcess):
    """A forked process that takes `SIGNALS` from its parent only, and ends at the first of them.

    Torch's own worker dies of a SIGTERM that anyone sends, and takes the training with it, which
    was to save first. The signals are blocked from before the fork on, since libraries (W&B is
    one) start threads inside it, and a thread that does not block a signal runs its handler.
    """

    def start(self) -> None:
        """Starts the process; the signals are blocked in the caller's thread meanwhile."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        """What the process does; waits for the parent's signals beside it."""
        for signum in SIGNALS:
            # The parent's handlers were inherited. Torch puts one of its own behind SIGTERM later.
            signal.signal(signum, signal.SIG_IGN)
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
        super().run()


class WorkerContext(ForkContext):
    """For ``multiprocessing_context`` of torch's `DataLoader`: workers are `WorkerProcess`."""

    Process = WorkerProcess


def _obey(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)
