"""Says where the time of a step goes: log keys on every run, a trace and a table on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from torch.profiler import ProfilerActivity, profile

from projects.llava_sam2_rl.engine.timing import Spent, in_order_of_step, phase, phases, table
from projects.llava_sam2_rl.registry import HOOKS


@HOOKS.register_module()
class ProfileHook(Hook):
    """Logs seconds per phase as ``time/…``; profiles some iterations where asked to.

    The phases are those of `engine.timing.PHASES`; ``time/forward`` is what a forward pass takes
    beyond the named phases inside it, and ``time/data_wait`` the time the step waited for its data.
    ``time/rewards_hidden`` is no part of the step: for so long a judge was at work while the step
    went on, and ``time/rewards`` is what was still waited for.
    On a GPU, work runs on while the clock is read, so that a key may hold the time of a neighbour;
    while profiling the clock waits for the GPU.

    ``<work_dir>/profile/`` then holds ``trace_<rank>.json.gz`` (for chrome://tracing or
    ui.perfetto.dev) and ``phases_<rank>.md``: seconds, share and memory by phase.

    Args:
        steps: Number of iterations that are profiled. Defaults to 0, no profile.
        start: Number of iterations of this run before the profile. Defaults to 3.

    Raises:
        ValueError: A number is negative.
    """

    # Behind the timer and behind the hooks that work in `after_train_iter`, before the logger.
    priority = 'NORMAL'

    def __init__(self, steps: int = 0, start: int = 3) -> None:
        if steps < 0 or start < 0:
            raise ValueError(f'steps and start must not be negative, got {steps} and {start}')
        self.steps, self.start = steps, start
        self._seen = 0
        self._profiler: profile | None = None
        self._total: dict[str, Spent] = {}

    def before_train(self, runner: Any) -> None:
        """Tells the backward pass apart from the optimizer's step."""
        phases.take()
        wrapper = runner.optim_wrapper
        backward = wrapper.backward

        def timed(*args: Any, **kwargs: Any) -> Any:
            with phase('backward'):
                return backward(*args, **kwargs)

        wrapper.backward = timed

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Starts the profile."""
        if self.steps and self._seen == self.start:
            device = next(runner.model.parameters()).device
            activities = [ProfilerActivity.CPU]
            if device.type == 'cuda':
                activities.append(ProfilerActivity.CUDA)
                phases.synchronize = lambda: torch.cuda.synchronize(device)
                phases.memory = lambda: torch.cuda.memory_allocated(device)
            else:
                process = psutil.Process()
                phases.memory = lambda: process.memory_info().rss
            phases.take()
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Logs the iteration's phases; ends the profile."""
        spent = phases.take()
        hub = runner.message_hub
        if 'train/data_time' in hub.log_scalars:
            spent['data_wait'] = Spent(hub.get_scalar('train/data_time').current(), 1)
        for name in in_order_of_step(spent):
            hub.update_scalar(f'train/time/{name}', spent[name].seconds)
        self._seen += 1
        if self._profiler is None:
            return
        for name, value in spent.items():
            total = self._total.setdefault(name, Spent())
            total.seconds += value.seconds
            total.calls += value.calls
            total.peak_bytes = max(total.peak_bytes, value.peak_bytes)
        if self._seen == self.start + self.steps:
            self._finish(runner)

    def after_train(self, runner: Any) -> None:
        """Takes the clock off the backward pass; writes a profile that was cut short."""
        if self._profiler is not None:
            self._finish(runner)
        vars(runner.optim_wrapper).pop('backward', None)

    def _finish(self, runner: Any) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        phases.synchronize = phases.memory = None
        folder = Path(runner.work_dir) / 'profile'
        folder.mkdir(parents=True, exist_ok=True)
        rank, count = get_rank(), self._seen - self.start
        trace = folder / f'trace_{rank}.json.gz'
        self._profiler.export_chrome_trace(str(trace))
        text = table(self._total, count)
        (folder / f'phases_{rank}.md').write_text(text + '\n', encoding='utf-8')
        runner.logger.info(f'Profile of {count} iterations, trace in {trace}:\n{text}')
        self._profiler, self._total = None, {}
