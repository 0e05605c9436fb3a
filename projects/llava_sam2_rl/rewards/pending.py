"""Scores that are asked for while the caller does something else."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread


class PendingScores:
    """What a reward's call will give back; asked for in a thread of its own from now on.

    For calls that wait for something else, a server. What computes in Python gains nothing.

    Args:
        ask: The call. What it raises, `result` raises.
    """

    def __init__(self, ask: Callable[[], list[float | None]]) -> None:
        self._future: Future[list[float | None]] = Future()
        self._ask = ask
        self._started = time.perf_counter()
        self._ended: float | None = None
        self._collected: float | None = None
        # A daemon, unlike the threads of an executor: a run that fails does not wait for a judge.
        Thread(target=self._run, name='reward', daemon=True).start()

    def _run(self) -> None:
        try:
            scores = self._ask()
        except BaseException as error:
            self._ended = time.perf_counter()
            self._future.set_exception(error)
        else:
            self._ended = time.perf_counter()
            self._future.set_result(scores)

    def result(self) -> list[float | None]:
        """The scores; waits for them."""
        if self._collected is None:
            self._collected = time.perf_counter()
        return self._future.result()

    @property
    def hidden(self) -> float:
        """Seconds for which it was under way before anyone waited: what starting early saved."""
        ends = [x for x in (self._ended, self._collected) if x is not None]
        return min([*ends, time.perf_counter()]) - self._started
