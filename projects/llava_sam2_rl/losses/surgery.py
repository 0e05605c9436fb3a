"""Gradient surgery: a task's gradient gives way to another's where the two conflict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def project_conflicting(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], Tensor]:
    """Takes from the second gradient what points against the first.

    With ``g1`` and ``g2`` all tensors of a gradient as one vector: where ``g1·g2 < 0``,
    ``g2 - (g1·g2 / g1·g1) g1``, which is orthogonal to ``g1``; else ``g2``. One half of PCGrad (Yu
    et al., "Gradient surgery for multi-task learning", 2020): the first task leads.

    Args:
        first: Gradients by parameter; ``None`` = 0.
        second: As many, of the same shapes.

    Returns:
        The projected second gradients, and the cosine of the angle between the two as it was
        (float32 scalar, 0 where one of them is 0).

    Raises:
        ValueError: The two have different lengths.
    """
    if len(first) != len(second):
        raise ValueError(f'{len(first)} gradients of one task, {len(second)} of the other')
    device = next((g.device for g in (*first, *second) if g is not None), None)

    def inner(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
        total = torch.zeros((), device=device)
        for x, y in zip(a, b):
            if x is not None and y is not None:
                total += (x.float() * y.float()).sum()
        return total

    dot, one, two = inner(first, second), inner(first, first), inner(second, second)
    norm = (one * two).sqrt()
    cosine = torch.where(norm > 0, dot / norm.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    if not dot < 0:
        return list(second), cosine
    share = dot / one
    projected: list[Tensor | None] = []
    for x, y in zip(first, second):
        if x is None:
            projected.append(y)
        else:
            taken = (share * x.float()).to(x.dtype)
            projected.append(-taken if y is None else y - taken)
    return projected, cosine
