"""Straight-through Gumbel-Softmax over the top-k tokens, and the masking of pseudo captions.

Jang et al. 2017 (Gumbel-Softmax, straight-through): the forward pass picks one token, the backward
pass acts as if the soft mixture had been used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from projects.llava_sam2_rl.losses.functional import at_least_float32

#: Tokens worked on at a time; few enough that a chunk's temporaries stay small beside the result.
CHUNK_SIZE = 64


def gumbel_embeds(
    logits: Tensor,
    embedding_weight: Tensor,
    *,
    tau: float,
    top_k: int,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings of sampled tokens through which a loss reaches the logits.

    Forward: the embedding of ``argmax((topk(logits) + noise) / tau)``, exactly. Backward: the
    gradient of ``sum_j softmax((topk(logits) + noise) / tau)_j E[id_j]`` with respect to the
    logits; ``embedding_weight``, where it requires a gradient, receives that of the forward value
    (its picked rows), as ``torch.nn.functional.gumbel_softmax(hard=True) @ E`` gives it.

    The ``(..., k, D)`` gather is never materialised: between forward and backward only the k ids
    (int32) and soft weights (float32) per token are kept. The softmax is in float32 at
    least, whatever the input's dtype.

    Args:
        logits: ``(..., V)`` float. Pass the caption's real positions only.
        embedding_weight: ``(V' >= V, D)``, the input embedding.
        tau: Softmax temperature, > 0.
        top_k: k, at most V.
        noise: ``(..., k)`` added to the top-k logits in the order of ``torch.topk`` (largest
            first); ``None`` draws standard Gumbel noise from the default generator; zeros take
            the arg-max of the logits.

    Returns:
        ``embeds`` ``(..., D)`` in the embedding's dtype, ``token_ids`` ``(...)`` int64.

    Raises:
        ValueError: ``tau <= 0``, ``top_k`` outside [1, V], or a shape does not fit.
    """
    vocab = logits.shape[-1]
    if not tau > 0:
        raise ValueError(f'tau must be positive, got {tau}')
    if not 1 <= top_k <= vocab:
        raise ValueError(f'top_k={top_k} must lie between 1 and the vocabulary size {vocab}')
    if embedding_weight.ndim != 2 or len(embedding_weight) < vocab:
        raise ValueError(
            f'embedding_weight {tuple(embedding_weight.shape)} must be (V, D) with a row for each '
            f'of the {vocab} logits'
        )
    lead = logits.shape[:-1]
    if noise is not None:
        if noise.shape != (*lead, top_k):
            raise ValueError(f'noise is {tuple(noise.shape)}, expected {(*lead, top_k)}')
        noise = noise.detach().reshape(-1, top_k)
    embeds, token_ids = _GumbelEmbeds.apply(
        logits.reshape(-1, vocab), embedding_weight, tau, top_k, noise
    )
    return embeds.view(*lead, embedding_weight.shape[1]), token_ids.view(lead)


class _GumbelEmbeds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        embedding_weight: Tensor,
        tau: float,
        top_k: int,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count = len(logits)
        ids = torch.empty(count, top_k, dtype=torch.int32, device=logits.device)
        soft = torch.empty(
            count,
            top_k,
            dtype=torch.promote_types(logits.dtype, torch.float32),
            device=logits.device,
        )
        token_ids = torch.empty(count, dtype=torch.int64, device=logits.device)
        for rows in _chunks(count):
            values, indices = logits[rows].topk(top_k)
            ids[rows] = indices
            scores = at_least_float32(values)
            if noise is None:
                # -log(Exponential(1)) is standard Gumbel; the draw is never 0.
                scores = scores - torch.empty_like(scores).exponential_().log_()
            else:
                scores = scores + noise[rows]
            scores.div_(tau)
            picked = scores.argmax(1, keepdim=True)
            token_ids[rows] = indices.gather(1, picked)[:, 0]
            soft[rows] = scores.softmax(1)
        ctx.save_for_backward(ids, soft, token_ids, embedding_weight)
        ctx.tau, ctx.logits_shape, ctx.logits_dtype = tau, logits.shape, logits.dtype
        ctx.mark_non_differentiable(token_ids)
        return embedding_weight[token_ids], token_ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_embeds: Tensor, _: Any) -> Any:
        ids, soft, token_ids, embedding_weight = ctx.saved_tensors
        grad_embeds = grad_embeds.contiguous()
        grad_logits = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_logits = torch.zeros(
                ctx.logits_shape, dtype=ctx.logits_dtype, device=grad_embeds.device
            )
            for rows in _chunks(len(ids)):
                weights = soft[rows]
                grad = _dot_with_rows(grad_embeds[rows], embedding_weight, ids[rows])
                grad = grad.to(soft.dtype)
                # Through the softmax: y * (g - sum y g) / tau.
                grad.sub_((grad * weights).sum(1, keepdim=True)).mul_(weights).div_(ctx.tau)
                grad_logits[rows].scatter_(1, ids[rows].long(), grad.to(ctx.logits_dtype))
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(embedding_weight)
            grad_weight.index_add_(0, token_ids, grad_embeds)
        return grad_logits, grad_weight, None, None, None


def _dot_with_rows(vectors: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """``out[n, j] = vectors[n] · table[ids[n, j]]`` without gathering the rows.

    It is the gradient of ``embedding_bag`` with respect to its per-sample weights, whose kernel
    reads every row once and writes one number.
    """
    count, k = ids.shape
    offsets = torch.arange(0, count * k, k, dtype=ids.dtype, device=ids.device)
    bag_of = torch.arange(count, dtype=ids.dtype, device=ids.device).repeat_interleave(k)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors.to(table.dtype), table, ids.reshape(-1), offsets, bag_of, 0
    ).view(count, k)


def _chunks(count: int) -> list[slice]:
    """Slices of at most an eighth of the tokens, so that temporaries stay below the result."""
    size = max(1, min(CHUNK_SIZE, count // 8))
    return [slice(start, start + size) for start in range(0, count, size)]


def length_weights(log_end_probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Attention weights of a caption's tokens that let a loss say where it should have ended.

    A caption that goes on with token t with probability ``1 - e_t`` has the expected loss
    ``Σ_t a_t e_t L_t + a_T L_T`` with ``a_t = Π_{s<t} (1 - e_s)`` and ``L_t`` the loss of its first
    t tokens. Its gradient, with the tokens as they are, is ``Σ_t a_t e_t (L_t - L_T) ∇log e_t``.
    One t is drawn with probability ``a_t e_t / Z``, ``Z = Σ a_t e_t``. What the tail costs,
    ``L_T - L_t``, is the integral of ``dL/dg`` where g, from 0 to 1, weighs the tail in the softmax
    of every attention layer, so that ``dL/dg`` at a uniformly drawn g estimates it without bias.
    (At g = 1 it does not: there the attention to what matters is saturated, its gradient near 0.)

    Args:
        log_end_probs: ``(T,)``: log e_t, of ending instead of going on with token t.
        generator: Source of the randomness, on the CPU.

    Returns:
        ``(T,)`` float32 (or wider) weights in (0, 1]: 1 before t, g from t on. Their gradient is
        that of the expected loss with respect to ``log_end_probs``.

    Raises:
        ValueError: ``log_end_probs`` is not a non-empty vector.
    """
    if log_end_probs.ndim != 1 or not len(log_end_probs):
        raise ValueError(f'log_end_probs must be (T,), T >= 1, got {tuple(log_end_probs.shape)}')
    log_ends = at_least_float32(log_end_probs).clamp(max=0)
    ends = log_ends.detach().exp().clamp(max=1 - 1e-6)
    going_on = torch.log1p(-ends)
    ended_here = (going_on.cumsum(0) - going_on).exp() * ends
    total = ended_here.sum()
    weights = torch.ones_like(log_ends)
    if total < torch.finfo(log_ends.dtype).tiny:
        return weights  # the caption cannot end inside
    t = int(torch.multinomial(ended_here.cpu(), 1, generator=generator))
    # Weights enter as logarithms: none may be 0.
    share = torch.rand((), generator=generator).clamp(min=1e-4).to(weights)
    tail = share - total * (log_ends[t] - log_ends[t].detach())
    return torch.cat([weights[:t], tail.expand(len(weights) - t)])


def mask_tokens(
    token_ids: Tensor,
    valid: Tensor,
    mask_ratio: float,
    allowed_ids: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replaces a share of every row's valid tokens by other, random, allowed tokens.

    Of a row's n valid tokens ``mask_ratio * n`` are replaced, rounded up or down at random so that
    the share is right on average for short captions too. The replacement differs from what stood
    there as long as ``allowed_ids`` holds another id.

    Args:
        token_ids: ``(B, T)`` int64.
        valid: ``(B, T)`` bool; only these may change (no padding, no markers).
        mask_ratio: Share in [0, 1].
        allowed_ids: ``(A,)`` int64, distinct ids to draw from uniformly: ordinary tokens only.
        generator: Source of the randomness; its device may differ from the tokens'.

    Returns:
        A new ``(B, T)`` int64 tensor.

    Raises:
        ValueError: ``mask_ratio`` outside [0, 1], shapes differ, or ``allowed_ids`` is empty.
    """
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f'mask_ratio must lie in [0, 1], got {mask_ratio}')
    if token_ids.ndim != 2 or token_ids.shape != valid.shape:
        raise ValueError(
            f'token_ids {tuple(token_ids.shape)} and valid {tuple(valid.shape)} must both be (B, T)'
        )
    if allowed_ids.ndim != 1 or len(allowed_ids) == 0:
        raise ValueError(f'allowed_ids must be (A,) with A >= 1, got {tuple(allowed_ids.shape)}')
    device = 'cpu' if generator is None else generator.device
    shape = tuple(token_ids.shape)
    tokens, real, allowed = token_ids.to(device), valid.bool().to(device), allowed_ids.to(device)

    expected = mask_ratio * real.sum(1).double()
    extra = torch.rand(shape[0], generator=generator, dtype=torch.float64, device=device)
    # The tolerance keeps 0.1 * 10 = 1.0000000000000002 from rounding up once in a long while.
    num_replaced = (expected + 1e-9).floor()
    num_replaced += extra < (expected - num_replaced)
    order = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
    order = order.masked_fill(~real, torch.inf).argsort(1).argsort(1)
    replaced = (order < num_replaced[:, None]) & real

    draw = torch.randint(len(allowed), shape, generator=generator, device=device)
    if len(allowed) > 1:
        # A draw that hits the token itself moves on by a random 1 .. A-1: uniform over the others.
        step = torch.randint(1, len(allowed), shape, generator=generator, device=device)
        draw = torch.where(allowed[draw] == tokens, (draw + step) % len(allowed), draw)
    return torch.where(replaced, allowed[draw], tokens).to(token_ids.device)
