"""Copies between the host and a GPU that keep neither waiting for longer than they must."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. The host does not wait for a GPU: it copies from pinned memory."""
    if torch.device(device).type == 'cpu' or tensor.device.type != 'cpu':
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def indices_on(device: torch.device | str, numbers: Sequence[int]) -> Tensor:
    """``(N,)`` int64 on a device, for which a list as an index has the host wait."""
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)


def true_places(mask: Tensor, count: int) -> Tensor:
    """``(count,)`` int64: where a flat bool mask is true, in order; no GPU is waited for.

    Args:
        mask: ``(N,)`` bool.
        count: How often it is true, which the host knows.
    """
    return (~mask).to(torch.uint8).argsort(stable=True)[:count]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors of one dtype on the CPU, for which the host waits once."""
    if not tensors:
        return []
    parts = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = parts.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
