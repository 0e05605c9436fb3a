"""Reductions over ranks, and the DDP wrapper that keeps the model's own training step.

Ranks see different data: one has a record without a caption, another samples longer rollouts, a
third meets a loss that is not finite. So nothing here or in the model calls a collective under a
condition that may differ between ranks: one exchange after each forward pass (`reduce_losses`)
tells every rank what all of them have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, get_world_size
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn

from projects.llava_sam2_rl.structures import MeanLoss
from projects.llava_sam2_rl.utils.devices import to_host


@dataclass(frozen=True)
class ReducedLosses:
    """The losses and metrics of one forward pass, reduced over all ranks.

    Args:
        factors: What this rank's losses are multiplied by, so that the mean over ranks (which is
            what DDP and ZeRO take of gradients) is the mean over all items of all ranks.
        losses: The losses over all ranks, the same on every rank.
        metrics: The metrics over all ranks, the same on every rank.
        not_finite: Losses that are not finite on some rank; the step is skipped where there are.
    """

    factors: dict[str, float]
    losses: dict[str, float]
    metrics: dict[str, float]
    not_finite: list[str]

    def scale(self, losses: Mapping[str, MeanLoss]) -> dict[str, Tensor]:
        """This rank's losses times their factors."""
        return {
            key: loss.value if self.factors[key] == 1 else self.factors[key] * loss.value
            for key, loss in losses.items()
        }


def reduce_losses(
    losses: Mapping[str, MeanLoss], metrics: Mapping[str, Tensor | float]
) -> ReducedLosses:
    """Reduces losses and metrics over all ranks in one exchange; to be called on every rank.

    A loss that is a mean over ``n_r`` items on rank r is multiplied by ``W * n_r / Σ n``. With
    it, W ranks with a batch of 1 give the gradients of one rank with a batch of W, whatever the
    ranks' numbers of captions and tokens are.

    Args:
        losses: By log key; keys may differ between ranks (no caption, no such loss).
        metrics: Scalars, for the log.
    """
    mine = _as_numbers(
        {key: loss.value for key, loss in losses.items()},
        metrics,
        {key: loss.count for key, loss in losses.items() if loss.count is not None},
    )
    rows = all_gather_object(mine)
    ranks = len(rows)
    keys = _union(row[0] for row in rows)
    totals = {key: sum(row[2].get(key, 0.0) for row in rows) for key in keys}

    def factor(key: str, counts: Mapping[str, float]) -> float:
        if key not in counts:
            return 1.0
        return ranks * counts[key] / totals[key] if totals[key] else 0.0

    return ReducedLosses(
        factors={key: factor(key, mine[2]) for key in losses},
        losses={
            key: sum(factor(key, row[2]) * row[0][key] for row in rows if key in row[0]) / ranks
            for key in keys
        },
        metrics={
            key: _merged(key, [row[1][key] for row in rows if key in row[1]])
            for key in _union(row[1] for row in rows)
        },
        not_finite=[
            key for key in keys if not all(math.isfinite(row[0].get(key, 0.0)) for row in rows)
        ],
    )


def _as_numbers(*groups: Mapping[str, Tensor | float]) -> list[dict[str, float]]:
    """Scalars on the host, which waits for a GPU once."""

    def is_there(x: Tensor | float) -> bool:
        return isinstance(x, Tensor) and x.device.type != 'cpu'

    scalars = [
        {key: x.detach() if isinstance(x, Tensor) else x for key, x in group.items()}
        for group in groups
    ]
    there = [x for group in scalars for x in group.values() if is_there(x)]
    numbers = iter(to_host([torch.as_tensor(x).double() for x in there]))
    return [
        {key: float(next(numbers) if is_there(x) else x) for key, x in group.items()}
        for group in scalars
    ]


def _union(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _merged(key: str, values: Sequence[float]) -> float:
    """Counts are added up, extremes stay extremes, all else is averaged over who has it."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return math.nan
    name = key.rsplit('/', 1)[-1]
    if name.startswith('min_'):
        return min(values)
    if name.startswith('max_'):
        return max(values)
    if name.startswith(('num_', 'empty_')) or key == 'curriculum/samples':
        return sum(values)
    return sum(values) / len(values)


def global_std(values: Sequence[Tensor | None], device: torch.device) -> list[Tensor]:
    """Standard deviations (Bessel's correction) of tensors that lie in parts on all ranks.

    To be called on every rank, with ``None`` for what a rank has no part of.

    Args:
        values: K flat float tensors; NaN takes no part.
        device: Where the collectives run.

    Returns:
        K float64 scalars, alike on all ranks; 0 for fewer than two values.
    """
    parts = [torch.zeros(0) if x is None else x.detach().flatten().cpu() for x in values]
    parts = [x[~x.isnan()].double() for x in parts]
    sums = torch.tensor(
        [[len(x), float(x.sum())] for x in parts], dtype=torch.float64, device=device
    )
    all_reduce(sums)
    count, total = sums.cpu().unbind(1)
    mean = total / count.clamp(min=1)
    squares = torch.stack([((x - m) ** 2).sum() for x, m in zip(parts, mean, strict=True)])
    squares = squares.to(device)
    all_reduce(squares)
    return list((squares.cpu() / (count - 1).clamp(min=1)).sqrt())


def mean_of_logged(keys: Sequence[str], window: int, device: torch.device) -> list[float] | None:
    """Means of logged scalars over the last steps and over the ranks that have logged them.

    To be called on every rank.

    Args:
        keys: Of mmengine's message hub.
        window: Number of last steps.
        device: Where the collective runs.

    Returns:
        A number per key; ``None`` where some key was logged on no rank.
    """
    sums = torch.zeros(2, len(keys), device=device)  # of the means, and how many there are
    hub = MessageHub.get_current_instance()
    for n, key in enumerate(keys):
        if key in hub.log_scalars:
            sums[0, n] = hub.get_scalar(key).mean(window)
            sums[1, n] = 1
    all_reduce(sums)
    return (sums[0] / sums[1]).tolist() if sums[1].all() else None


def optim_context(optim_wrapper: Any, model: nn.Module) -> AbstractContextManager:
    """mmengine's scope of a forward pass: autocast, and when DDP exchanges gradients.

    DeepSpeed's wrapper has none: its engine knows both by itself.
    """
    if isinstance(optim_wrapper, OptimWrapper):
        return optim_wrapper.optim_context(model)
    return nullcontext()


def drop_gradients(optim_wrapper: Any) -> None:
    """Drops accumulated gradients; a DeepSpeed engine has seen nothing of a skipped step."""
    if isinstance(optim_wrapper, OptimWrapper):
        optim_wrapper.zero_grad()


def unwrapped(runner: Any) -> Any:
    """``runner.model``, out of its DDP or DeepSpeed wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def full_parameter(parameter: nn.Parameter) -> Tensor:
    """The whole parameter, without gradient, as precisely as it is known.

    Under DDP, and under ZeRO in float32, that is the tensor itself. DeepSpeed in bf16 keeps
    float32 masters, of which each rank has a share: they are gathered, which is a collective, as
    are weights that ZeRO-3 keeps in parts.
    """
    is_shared_out = hasattr(parameter, '_hp_mapping') or hasattr(parameter, '_z3_optimizer')
    is_whole = parameter.dtype == torch.float32 and getattr(parameter, 'ds_persist', True)
    if is_shared_out and not is_whole:
        # Here, since importing DeepSpeed takes seconds.
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).view_as(parameter)
    return parameter.detach()


def is_shared() -> bool:
    """Whether there is another rank."""
    return get_world_size() > 1


def zero_loss_over(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """0, as a sum over all parameters, so that each of them gets a gradient.

    Which parameters a step uses depends on its data (no caption, no mask decoder). DDP waits for a
    gradient of each; searching the graph for the others (``find_unused_parameters``) costs time
    at every step and fails where ranks use different ones. So a parameter that was not used has
    the gradient zero, under every launcher, on which DDP, ZeRO and one process agree.
    """
    return _ZeroOver.apply(device, *parameters)


class _ZeroOver(torch.autograd.Function):
    """0 with zero gradients, without an operation for each parameter but that of adding them."""

    @staticmethod
    def forward(ctx: Any, device: torch.device, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return torch.zeros((), device=device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        zeros = {
            kind: torch.zeros((), dtype=kind[0], device=kind[1])
            for kind in {(dtype, device) for _, dtype, device in ctx.like}
        }
        return None, *(zeros[dtype, device].expand(shape) for shape, dtype, device in ctx.like)


def ordered_backward(
    loss: Tensor, parameters: Sequence[Tensor], before_exchange: Callable[[], None] | None = None
) -> Tensor:
    """The same loss, whose backward pass gives all parameters their gradients at its end, in order.

    ZeRO-2 and -3 collect gradients in buckets as the backward pass finds them, and add the buckets
    of all ranks up. Which gradient is found first depends on the rank's data: where one rank has
    no caption, the buckets would hold different parameters on different ranks and be added up all
    the same. The cost is that all gradients are there at once for a moment.

    Args:
        loss: A scalar.
        parameters: What it depends on, in an order that is the same on all ranks.
        before_exchange: Called when all gradients are there and none is collected yet. Defaults to
            None.
    """
    return _OrderedBackward.apply(_Graph(loss, before_exchange), *parameters)


@dataclass(frozen=True)
class _Graph:
    """Hides the loss from autograd, which would walk through its graph by itself."""

    loss: Tensor
    before_exchange: Callable[[], None] | None


class _OrderedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *parameters: Tensor) -> Tensor:
        ctx.graph, ctx.parameters = graph, parameters
        return graph.loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In here, so that what scales the loss (accumulation, float16) scales it before.
        found = torch.autograd.grad(
            ctx.graph.loss, ctx.parameters, gradient.to(ctx.graph.loss.dtype), allow_unused=True
        )
        if ctx.graph.before_exchange is not None:
            ctx.graph.before_exchange()
        return None, *(
            torch.zeros_like(p) if g is None else g for g, p in zip(found, ctx.parameters)
        )


@MODEL_WRAPPERS.register_module()
class DualLoopDistributed(MMDistributedDataParallel):
    """DDP around `DualLoopModel` that keeps the model's own ``train_step``.

    mmengine's wrapper has a step of its own, one forward and one update: with it
    ``num_iterations`` and the skipping of steps whose loss is not finite would be lost.

    Args:
        module: The `DualLoopModel`.
        device_ids: As of DDP; mmengine's runner gives the local GPU, which is ignored where the
            model lies on the CPU.
        **options: As of mmengine's ``MMDistributedDataParallel``.
    """

    def __init__(self, module: Any, device_ids: list[int] | None = None, **options: Any) -> None:
        if next(module.parameters()).device.type == 'cpu':
            device_ids = None
        super().__init__(module=module, device_ids=device_ids, **options)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """`DualLoopModel.train_step`, its forward passes through DDP."""
        return self.module.train_step(data, optim_wrapper, wrapper=self)
