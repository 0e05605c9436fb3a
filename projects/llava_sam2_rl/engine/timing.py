"""Where the time of a step goes: `phase('decode')` around what is to be told apart.

Time is counted once: a phase inside another one pauses the outer. On a GPU the clock shows when
work was asked for, unless `Phases.synchronize` is set, which the profiler does.

What goes on beside the step, as a judge that is not waited for, is no phase: `phases.hide` adds its
seconds as ``…_hidden``, which are part of no sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import record_function

#: The names in use, in the order of a step.
PHASES = (
    'data_wait',
    'encode',
    'rollout',
    'prefill',
    'decode',
    'return_trip',
    'rewards',
    'log_probs',
    'forward',
    'exchange',
    'backward',
    'optimizer',
    'teacher',
)


#: Behind the name of what went on beside the phases.
HIDDEN = '_hidden'


@dataclass
class Spent:
    """What a phase took since the last look.

    Args:
        seconds: Time in it, without the phases inside it. Defaults to 0.
        calls: Number of times it was entered. Defaults to 0.
        peak_bytes: Most memory in use at one of its ends, in bytes. Defaults to 0, also where
            `Phases.memory` is not set.
    """

    seconds: float = 0.0
    calls: int = 0
    peak_bytes: int = 0


class Phases:
    """Adds up what each phase takes."""

    def __init__(self) -> None:
        #: Called before the clock is read, so that asynchronous work is counted where it belongs.
        self.synchronize: Callable[[], None] | None = None
        #: Bytes in use, read at the end of each phase.
        self.memory: Callable[[], int] | None = None
        self._spent: dict[str, Spent] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the scope as ``name``; the profiler's trace shows it by that name."""
        self._charge()
        self._open.append(name)
        self._spent.setdefault(name, Spent()).calls += 1
        try:
            with record_function(name):
                yield
        finally:
            self._charge()
            if self.memory is not None:
                spent = self._spent.setdefault(name, Spent())
                spent.peak_bytes = max(spent.peak_bytes, self.memory())
            self._open.pop()

    def hide(self, name: str, seconds: float) -> None:
        """Counts, as ``{name}_hidden``, work that nobody waited for since other work went on."""
        spent = self._spent.setdefault(name + HIDDEN, Spent())
        spent.seconds += seconds
        spent.calls += 1

    @property
    def current(self) -> str | None:
        """The innermost open phase."""
        return self._open[-1] if self._open else None

    def take(self) -> dict[str, Spent]:
        """What was spent since the last call."""
        self._charge()
        spent, self._spent = self._spent, {}
        return spent

    def _charge(self) -> None:
        """Adds the time since the last event to the innermost phase."""
        if self.synchronize is not None:
            self.synchronize()
        now = time.perf_counter()
        if self._open:
            self._spent.setdefault(self._open[-1], Spent()).seconds += now - self._since
        self._since = now


#: Of this process; models enter its phases, a hook reads them.
phases = Phases()
phase = phases.phase


def table(spent: dict[str, Spent], iterations: int) -> str:
    """Phases as a Markdown table: seconds and calls an iteration, share, memory at their ends."""
    whole = sum(value.seconds for name, value in spent.items() if not name.endswith(HIDDEN))
    lines = [
        '| phase | s an iteration | share | calls an iteration | memory MiB |',
        '| --- | ---: | ---: | ---: | ---: |',
    ]
    for name in in_order_of_step(spent):
        value = spent[name]
        memory = f'{value.peak_bytes / 2**20:.0f}' if value.peak_bytes else ''
        share = '' if name.endswith(HIDDEN) else f'{value.seconds / whole:.1%}'
        lines.append(
            f'| {name} | {value.seconds / iterations:.4f} | {share} '
            f'| {value.calls / iterations:g} | {memory} |'
        )
    return '\n'.join(lines)


def in_order_of_step(spent: dict[str, Spent]) -> list[str]:
    """Names of phases, those of `PHASES` in its order and others behind them."""
    known = [name for name in PHASES if name in spent]
    return known + [name for name in spent if name not in PHASES]
