"""How many bytes a piece of work allocates at its peak: evidence for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(work: Callable[[], Any], device: str | torch.device = 'cpu') -> int:
    """Peak of tensor memory allocated while ``work`` runs, above what was there before.

    Everything PyTorch's allocator hands out counts, a kernel's own scratch tensors included; on the
    CPU the events come from the profiler, on CUDA from the allocator's statistics.

    Args:
        work: Called once, without arguments. Let it return what it builds, so that the results are
            alive, and counted, at its end.
        device: Whose memory is measured.

    Returns:
        Bytes.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return peak - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    del result
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == '[memory]' and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    changes.sort(key=lambda change: change[0])
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak
