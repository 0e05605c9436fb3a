"""Log-probabilities of given tokens, with and without holding the logits of the whole vocabulary.

With V = 151 674 the float32 logits of one batch of 4 x 128 tokens are 311 MB, and the usual
``log_softmax`` plus its gradient hold three such tensors. :func:`chunked_logprobs` holds one chunk
of tokens at a time. Where only the hidden states need a gradient it is computed at once, since that
of a token is one direction times its upstream number; otherwise backward computes the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from projects.llava_sam2_rl.losses.functional import at_least_float32

#: Tokens per chunk: 155 MB of float32 logits at V = 151 674. Each chunk reads the whole head.
CHUNK_SIZE = 256


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
    return_entropy: bool = False,
    entropy_gradient: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of ``targets`` under ``softmax((hidden @ weight.T + bias) / temperature)``.

    Equal in value and gradient to the plain version; ``(..., V)`` never exists. The matrix product
    runs in the inputs' dtype (or autocast's), softmax and sums in float32 at
    least. Gradients go to
    ``hidden``, and to ``weight`` and ``bias`` where they require one. Tokens that receive no
    gradient (masked by the loss) cost nothing in backward and stay clean even if theirs is NaN.

    Args:
        hidden: ``(..., D)`` float, hidden state *before* each target (position t predicts token t).
        weight: ``(V, D)``, the output embedding; under ZeRO-3 gathered by the caller.
        bias: ``(V,)``; -inf takes a token out of the softmax.
        targets: ``(...)`` int64, each in [0, V), padding included (any valid id will do there).
        temperature: Sampling temperature, > 0.
        chunk_size: Tokens whose logits are held at a time; ``chunk_size * V * 4`` bytes.
        return_entropy: Also return the entropy of every position's distribution.
        entropy_gradient: Whether a gradient flows through it; without, the backward pass need not
            compute the logits again for it.

    Returns:
        ``per_token_logps`` ``(...)``, float32 at least, or ``(per_token_logps, entropy)``.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    _check_temperature(temperature)
    if chunk_size < 1:
        raise ValueError(f'chunk_size must be at least 1, got {chunk_size}')
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f'targets {tuple(targets.shape)} do not fit hidden {tuple(hidden.shape)}: one target '
            'per hidden state'
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f'weight must be (V, D) with D = {hidden.shape[-1]}, got {tuple(weight.shape)}'
        )
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        # Autograd's custom functions run outside autocast; do here what it would do to a linear.
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f'hidden is {hidden.dtype}, weight {weight.dtype}: cast one of them')
    logps, entropy = _ChunkedLogprobs.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        temperature,
        chunk_size,
        return_entropy,
        entropy_gradient,
    )
    logps = logps.view(targets.shape)
    return (logps, entropy.view(targets.shape)) if return_entropy else logps


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        with_entropy: bool,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logps = hidden.new_empty(len(hidden), dtype=dtype)
        log_normaliser = torch.empty_like(logps)
        entropy = torch.empty_like(logps) if with_entropy else None
        # d logp_y / d hidden, but for the upstream factor: one product less than doing it later.
        early = ctx.needs_input_grad[:3] == (True, False, False)
        early = early and not (with_entropy and entropy_gradient)
        direction = torch.empty_like(hidden) if early else None
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            logits = _scaled_logits(hidden[rows], weight, bias, temperature)
            selected = logits.gather(1, targets[rows, None])[:, 0]
            # logsumexp by hand, in place: the library's holds a second (chunk, V) tensor.
            top = logits.amax(1)
            logits.sub_(top[:, None])
            total = logits.exp_().sum(1)
            lse = total.log().add_(top)
            if direction is not None:
                mean = (logits.to(weight.dtype) @ weight).to(dtype).div_(total[:, None])
                mean.sub_(weight[targets[rows]]).div_(-temperature)
                direction[rows] = mean.to(hidden.dtype)
            if entropy is not None:
                logits.div_(total[:, None])
                entropy[rows] = torch.special.entr(logits, out=logits).sum(1)
            logps[rows] = selected - lse
            log_normaliser[rows] = lse
            del logits  # or it would live on beside the next chunk's
        if direction is not None:
            ctx.save_for_backward(direction)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, log_normaliser, entropy)
        ctx.early = early
        if entropy is not None and not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if ctx.early:
            (direction,) = ctx.saved_tensors
            if grad_logps is None:
                return torch.zeros_like(direction), *[None] * 7
            # What the loss leaves out stays clean even where its own direction is not finite.
            left_out = (grad_logps == 0)[:, None]
            grad = grad_logps.to(direction.dtype)[:, None] * direction
            return grad.masked_fill_(left_out, 0), *[None] * 7
        hidden, weight, bias, targets, log_normaliser, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Full-precision sums over the chunks, whatever the parameters' dtype.
        full = log_normaliser.dtype
        grad_weight = torch.zeros_like(weight, dtype=full) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=full) if needs_bias else None

        grad_logps = torch.zeros_like(log_normaliser) if grad_logps is None else grad_logps
        active = grad_logps != 0
        if entropy is not None and grad_entropy is not None:
            active = active | (grad_entropy != 0)
        # The entropy's gradient needs a second tensor of a chunk's size.
        size = ctx.chunk_size if grad_entropy is None else max(1, ctx.chunk_size // 2)
        for rows in active.nonzero()[:, 0].split(size):
            part = hidden[rows]
            logits = _scaled_logits(part, weight, bias, ctx.temperature)
            logits.sub_(log_normaliser[rows, None])  # log p
            if entropy is None or grad_entropy is None:
                grad = logits.exp_().mul_(-grad_logps[rows, None])
            else:
                # d logp_y / d x = onehot - p;  d H / d x = -p (log p + H).
                # p = 0 gives 0 * -inf there, hence the clamp.
                factor = (logits + entropy[rows, None]).clamp_(min=torch.finfo(full).min)
                factor.mul_(grad_entropy[rows, None]).add_(grad_logps[rows, None])
                grad = logits.exp_().mul_(factor).neg_()
                del factor
            ones = grad_logps[rows, None]
            grad.scatter_add_(1, targets[rows, None], ones)
            grad.div_(ctx.temperature)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                if grad_weight.dtype == grad.dtype:
                    grad_weight.addmm_(grad.T, part)
                else:
                    grad_weight += grad.T @ part
            del logits, grad
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _scaled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> Tensor:
    """A fresh, at least float32, ``(rows, V)`` tensor that the caller may overwrite."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = at_least_float32(logits)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f'temperature must be positive, got {temperature}')
