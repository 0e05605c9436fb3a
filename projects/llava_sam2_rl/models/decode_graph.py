"""Steps of decoding as CUDA graphs: a thousand launches a token become one.

A step of a token launches some 25 kernels a layer, and launching them takes a GPU's host longer
than the GPU computes. A CUDA graph is captured once and replayed in one call. It repeats what was
captured to the letter, at the same addresses: what changes from step to step has to be in tensors
that stay where they are, and shapes must not change. So attention passes over a width that grows
every `WIDTH` positions alone, and there is a graph for each width. A rollout captures its own,
since LoRA's weights are prepared anew for it; this takes about as long as the step by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

CHOICES = ('auto', 'off')
#: Positions by which the width of attention grows. So many are passed over in vain, at most.
WIDTH = 256
#: Seconds that a capture may take; where it takes longer the rest is done without.
_PATIENCE = 20.0
#: Largest difference of a hidden state to that of the step by itself, to the largest of them.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: A step: from tensors that stay where they are to a new one.
Step = Callable[[], Tensor]


class DecodeGraphs:
    """Whether steps of decoding are replayed from CUDA graphs, found out once and logged.

    Args:
        choice: ``'auto'``: on a GPU where it works; where it does not, a line of log says why.
            ``'off'``: never.

    Raises:
        ValueError: ``choice`` is unknown.
    """

    def __init__(self, choice: str = 'auto') -> None:
        if choice not in CHOICES:
            raise ValueError(f'decode_graphs must be one of {", ".join(CHOICES)}, got {choice!r}')
        self.choice = choice
        #: Whether a graph gave what the step gives; ``None`` before the first.
        self.work: bool | None = None

    def for_rollout(self, language_model: nn.Module, device: torch.device) -> StepGraphs | None:
        """A rollout's graphs; ``None`` where its steps run by themselves."""
        if self.choice == 'off' or device.type != 'cuda' or self.work is False:
            return None
        if any(hasattr(parameter, 'ds_id') for parameter in language_model.parameters()):
            self.give_up('ZeRO-3 moves the weights')
            return None
        return StepGraphs(self)

    def give_up(self, reason: object) -> None:
        """Leaves it at steps by themselves, and says why, in one line."""
        self.work = False
        said = str(reason).strip().partition('\n')[0]
        print_log(f'Decoding without CUDA graphs: {said}', logger='current')


class StepGraphs:
    """The graphs of a rollout, one for each width.

    Args:
        graphs: Knows whether they work.
    """

    def __init__(self, graphs: DecodeGraphs) -> None:
        self._graphs = graphs
        self._pool: Any = None
        self._captured: dict[int, tuple[Callable[[], None], Tensor]] = {}

    def clear(self) -> None:
        """What the steps read and write has changed its place."""
        self._captured.clear()

    def run(self, width: int, step: Step, autocast: bool = False) -> Tensor:
        """One step; what it returns is overwritten by the next one of the same width.

        Args:
            width: Steps of one width differ in the contents of tensors alone.
            step: To run twice is to run once.
            autocast: Whether autocast casts inside of it: it would keep copies of weights that are
                the graph's. Defaults to False.
        """
        if autocast and self._graphs.work is not False:
            self._graphs.give_up('autocast is on, and not all layers of this model are known')
        if self._graphs.work is False:
            return step()
        if width not in self._captured:
            # The first step of all by itself: libraries set themselves up in it.
            expected = step() if self._graphs.work is None else None
            started = time.monotonic()
            try:
                self._captured[width] = capture(step, self._pool_of_graphs())
            except Exception as error:  # whatever a library or a driver does not like
                self._graphs.give_up(error)
                return step() if expected is None else expected
            if time.monotonic() - started > _PATIENCE:
                self._graphs.give_up(f'a capture took longer than {_PATIENCE:.0f} s')
                return step() if expected is None else expected
            if expected is not None:
                return self._compared(width, expected)
        replay, out = self._captured[width]
        replay()
        return out

    def _compared(self, width: int, expected: Tensor) -> Tensor:
        """The first replay, held to what the step gave; this waits for the GPU, once."""
        replay, out = self._captured[width]
        replay()
        scale = expected.float().abs().amax().clamp(min=1e-6)
        difference = ((out.float() - expected.float()).abs().amax() / scale).item()
        if not difference <= _TOLERANCE.get(out.dtype, 0.0):
            self._graphs.give_up(f'its results are {difference:.2g} off')
            return expected
        self._graphs.work = True
        print_log('Decoding by CUDA graphs', logger='current')
        return out

    def _pool_of_graphs(self) -> Any:
        """Memory that the graphs of a rollout share: only one of them runs at a time."""
        if self._pool is None:
            self._pool = new_pool()
        return self._pool


def new_pool() -> Any:
    """Memory for graphs."""
    return torch.cuda.graph_pool_handle()


def capture(step: Step, pool: Any) -> tuple[Callable[[], None], Tensor]:
    """Records a step without running it.

    Unlike `torch.cuda.graph` it neither collects garbage nor empties PyTorch's cache of memory,
    which would take longer than all else.

    Args:
        step: What is recorded.
        pool: Memory of its results.

    Returns:
        What replays it, and the tensor that it writes.
    """
    graph = torch.cuda.CUDAGraph()
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        # Other threads (pinned memory, a judge's answers) may use CUDA meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode='thread_local')
        try:
            out = step()
        finally:
            graph.capture_end()
    here.wait_stream(aside)
    return graph.replay, out
