"""Gradient surgery between the two directions, as part of a training step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from projects.llava_sam2_rl.losses import project_conflicting


def apply_gradient_surgery(
    losses: Mapping[str, Tensor], total: Tensor, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor | float]:
    """A loss of the same value whose gradient is that of gradient surgery.

    It is linear in the parameters with the gradient as its factor, so that the optimizer wrapper's
    scaling and accumulation work as for any loss. To be called on every rank.

    Args:
        losses: By log key; ``loop1/…`` and ``loop2/…`` are the two directions.
        total: Their sum.
        parameters: That are trained.

    Returns:
        The loss, and the cosine between the two gradients (NaN where a rank lacks a direction:
        then the loss is ``total``).
    """
    first, second = (
        [value for key, value in losses.items() if key.startswith(f'{prefix}/')]
        for prefix in ('loop1', 'loop2')
    )
    # All ranks have to agree to go on, since they add up their gradients below.
    both = torch.tensor(float(bool(first and second)), device=total.device)
    all_reduce(both, op='min')
    if not both:
        return total, math.nan
    gradients: list[list[Tensor]] = []
    for terms in (first, second):
        grads = torch.autograd.grad(
            torch.stack(terms).sum(), parameters, retain_graph=True, allow_unused=True
        )
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)]
        for gradient in found:
            all_reduce(gradient, op='mean')
        gradients.append(found)
    projected, cosine = project_conflicting(*gradients)
    surrogate = torch.zeros_like(total)
    for parameter, a, b in zip(parameters, gradients[0], projected):
        surrogate = surrogate + (parameter * (a if b is None else a + b)).sum()
    return total.detach() + surrogate - surrogate.detach(), cosine
