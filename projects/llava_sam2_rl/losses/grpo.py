"""The clipped group-relative policy-gradient loss (GRPO) and its reductions; pure tensor math.

Formulas and names follow TRL's ``GRPOTrainer``. Sources: Shao et al. 2024 (GRPO), Yu et al. 2025
(DAPO: token-level reduction, asymmetric clipping), Liu et al. 2025 (Dr. GRPO: constant length),
Zheng et al. 2025 (GSPO: sequence-level importance ratio), MiniMax 2025 (CISPO) and Gao et al. 2025
(SAPO: other surrogates), Wang et al. 2025 (tokens of high entropy), Schulman's k3 estimator of the
KL.

With one iteration per batch of rollouts the importance ratio is 1 everywhere, and because the
advantages of a group sum to 0 the *value* of the loss is about 0 (or beta * KL) while its gradient
is not: the value says nothing about learning, the reward curve does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from projects.llava_sam2_rl.losses.functional import at_least_float32

#: exp(20) = 4.9e8 is far outside every clip range and still finite in every dtype's accumulator.
MAX_LOG_RATIO = 20.0
IMPORTANCE_SAMPLING_LEVELS = ('token', 'sequence')


def reduce_grpo(per_token: Tensor, mask: Tensor, length: float, active: Tensor) -> Tensor:
    """Mean over completions of the mean over each one's tokens; an empty completion counts 0."""
    return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()


def reduce_bnpo(per_token: Tensor, mask: Tensor, length: float, active: Tensor) -> Tensor:
    """Sum over all tokens / active tokens of the local batch."""
    return per_token.sum() / mask.sum().clamp(min=1)


def reduce_dr_grpo(per_token: Tensor, mask: Tensor, length: float, active: Tensor) -> Tensor:
    """Sum over all tokens / (completions * max_completion_length): no bias towards any length."""
    return per_token.sum() / (per_token.shape[0] * length)


def reduce_dapo(per_token: Tensor, mask: Tensor, length: float, active: Tensor) -> Tensor:
    """Sum over all tokens / (active tokens of all ranks / world size)."""
    return per_token.sum() / active.clamp(min=1)


Reduction = Callable[[Tensor, Tensor, float, Tensor], Tensor]
REDUCTIONS: dict[str, Reduction] = {
    'grpo': reduce_grpo,
    'bnpo': reduce_bnpo,
    'dr_grpo': reduce_dr_grpo,
    'dapo': reduce_dapo,
}


@dataclass(frozen=True)
class Ratios:
    """What a surrogate is made of; all but the options broadcast to ``(N, T)``.

    Args:
        ratio: ρ, with gradient.
        logps: logπ, with gradient.
        advantage: A.
        epsilon_low, epsilon_high: The clip range.
        sapo_temperature_pos, sapo_temperature_neg: τ of SAPO.
    """

    ratio: Tensor
    logps: Tensor
    advantage: Tensor
    epsilon_low: float
    epsilon_high: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float

    @property
    def clipped(self) -> Tensor:
        """ρ, cut to the clip range."""
        return self.ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)


def surrogate_clip(r: Ratios) -> Tensor:
    """``min(ρA, clip(ρ, 1-ε_low, 1+ε_high)A)`` (PPO, Schulman et al. 2017; GRPO)."""
    return torch.min(r.ratio * r.advantage, r.clipped * r.advantage)


def surrogate_cispo(r: Ratios) -> Tensor:
    """``sg(clip(ρ, 1-ε_low, 1+ε_high)) A logπ``: the weight is clipped and no gradient is lost.

    MiniMax 2025, "MiniMax-M1", where ε_low is so large that only the upper end cuts:
    ``epsilon_low=1`` here.
    """
    return r.clipped.detach() * r.advantage * r.logps


def surrogate_sapo(r: Ratios) -> Tensor:
    """``(4/τ) σ(τ(ρ-1)) A``: a soft gate in place of the clip, of slope 1 at ρ = 1.

    τ is ``sapo_temperature_pos`` where A > 0, else ``sapo_temperature_neg``; a greater one damps
    off-policy tokens more (Gao et al. 2025, "Soft Adaptive Policy Optimization").
    """
    tau = torch.where(r.advantage > 0, r.sapo_temperature_pos, r.sapo_temperature_neg)
    return 4 / tau * torch.sigmoid(tau * (r.ratio - 1)) * r.advantage


Surrogate = Callable[[Ratios], Tensor]
#: What is maximised of each token, by what it does with importance ratios far from 1.
SURROGATES: dict[str, Surrogate] = {
    'clip': surrogate_clip,
    'cispo': surrogate_cispo,
    'sapo': surrogate_sapo,
}


def top_entropy_mask(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """The tokens at which the policy was least sure: the forks of a text, which decide it.

    Wang et al. 2025 ("Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective
    Reinforcement Learning for LLM Reasoning") take the gradient of the fifth with the
    highest entropy alone. The threshold is that of the tokens given; of several ranks, each has
    its own.

    Args:
        entropy: ``(N, T)`` of the distribution that each token was drawn from.
        mask: ``(N, T)`` bool, the tokens there are.
        quantile: Share of the tokens that is kept, in (0, 1].

    Returns:
        ``(N, T)`` bool, a part of ``mask``: entropies of at least the ``1 - quantile`` quantile.
    """
    if quantile == 1 or not bool(mask.any()):
        return mask
    values = at_least_float32(entropy.detach())
    return mask & (values >= torch.quantile(values[mask], 1 - quantile))


def grpo_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor | None,
    ref_per_token_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    beta: float,
    reduction: str,
    importance_sampling_level: str = 'token',
    max_completion_length: int | None = None,
    num_active_tokens: Tensor | float | None = None,
    per_token_kl: Tensor | None = None,
    surrogate: str = 'clip',
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    policy_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss with a KL penalty, over N = B*G completions of T tokens.

    Per token ``l = -min(ρA, clip(ρ, 1-ε_low, 1+ε_high)A) + β·k3`` (or another surrogate in place of
    the minimum, see `SURROGATES`) with ``ρ = exp(logπ - logπ_old)`` and
    ``k3 = exp(d) - d - 1``, ``d = logπ_ref - logπ``. Both log-ratios are clamped to ±20, which
    keeps a wild token finite and ends its gradient. All math is in float32 at
    least.

    What stands outside ``completion_mask`` touches neither value nor gradient, NaN and infinity
    included.

    Args:
        per_token_logps: ``(N, T)`` float, with gradient: logπ, logits divided by the sampling
            temperature.
        old_per_token_logps: ``(N, T)``, the policy that sampled; ``None`` means on-policy
            (``per_token_logps`` itself without gradient, ρ = 1).
        ref_per_token_logps: ``(N, T)``, the reference; ``None`` where there is no KL term.
        advantages: ``(N,)`` float.
        completion_mask: ``(N, T)`` bool or {0,1}; 1 = the token counts.
        epsilon_low: The ratio is clipped below at ``1 - epsilon_low``.
        epsilon_high: ... and above at ``1 + epsilon_high``.
        beta: Weight of the KL term; 0 = none. A given reference is then only measured.
        reduction: ``'grpo' | 'bnpo' | 'dr_grpo' | 'dapo'``.
        importance_sampling_level: ``'token'``, or ``'sequence'``: one ρ per completion, from the
            mean log-ratio over its tokens.
        max_completion_length: The constant of ``dr_grpo`` (what sampling was limited to). ``None``
            takes T, which is right only where completions are padded to the limit.
        num_active_tokens: The normaliser of ``dapo``: active tokens of all ranks / world size,
            computed by the caller. ``None`` takes this batch's own.
        per_token_kl: ``(N, T)`` KL to the reference in closed form, with gradient (the Gaussian
            ``[SEG]`` action), in place of k3.
        surrogate: ``'clip' | 'cispo' | 'sapo'``, see `SURROGATES`.
        sapo_temperature_pos: τ of SAPO for positive advantages.
        sapo_temperature_neg: τ of SAPO for the others.
        policy_mask: ``(N, T)`` bool, tokens whose policy term counts (`top_entropy_mask`). The KL
            term and what sums are divided by are those of ``completion_mask``. ``None`` = all.

    Returns:
        The loss, a scalar, and detached scalars: ``kl`` (mean over active tokens; only
        with a reference), ``clip_ratio/low_mean``, ``clip_ratio/high_mean``,
        ``clip_ratio/region_mean`` (share of active tokens, or of non-empty completions at
        sequence level, that the clip range cuts: below with A < 0, above with A > 0, either; their
        gradient is 0 with ``'clip'`` only) and ``policy_term`` (the reduced loss without KL).

    Raises:
        ValueError: Shapes disagree, an option is unknown, or ``beta > 0`` without a reference.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction={reduction!r} is unknown: use one of {", ".join(REDUCTIONS)}')
    if importance_sampling_level not in IMPORTANCE_SAMPLING_LEVELS:
        raise ValueError(
            f'importance_sampling_level={importance_sampling_level!r} is unknown: use one of '
            f'{", ".join(IMPORTANCE_SAMPLING_LEVELS)}'
        )
    if surrogate not in SURROGATES:
        raise ValueError(f'surrogate={surrogate!r} is unknown: use one of {", ".join(SURROGATES)}')
    if beta < 0 or epsilon_low < 0 or epsilon_high < 0:
        raise ValueError(
            f'beta={beta}, epsilon_low={epsilon_low}, epsilon_high={epsilon_high}: none may be '
            'negative'
        )
    if ref_per_token_logps is not None and per_token_kl is not None:
        raise ValueError('give ref_per_token_logps or per_token_kl, not both')
    if beta > 0 and ref_per_token_logps is None and per_token_kl is None:
        raise ValueError(
            f'beta={beta} needs a reference: pass ref_per_token_logps (configure one), or set '
            'beta=0'
        )
    _check_shapes(
        per_token_logps,
        advantages,
        old_per_token_logps=old_per_token_logps,
        ref_per_token_logps=ref_per_token_logps,
        completion_mask=completion_mask,
        per_token_kl=per_token_kl,
        policy_mask=policy_mask,
    )

    mask = completion_mask.bool()
    # `where` before any arithmetic: 0 * NaN would be NaN, in value and in gradient.
    logps = torch.where(mask, at_least_float32(per_token_logps), 0.0)
    if old_per_token_logps is None:
        old_logps = logps.detach()
    else:
        old_logps = torch.where(mask, at_least_float32(old_per_token_logps.detach()), 0.0)
    log_ratio = logps - old_logps
    if importance_sampling_level == 'sequence':
        mean_log_ratio = log_ratio.sum(1) / mask.sum(1).clamp(min=1)
        log_ratio = mean_log_ratio[:, None].expand_as(log_ratio)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantage = at_least_float32(advantages.detach())[:, None]
    per_token_policy = -SURROGATES[surrogate](
        Ratios(
            ratio,
            logps,
            advantage,
            epsilon_low,
            epsilon_high,
            sapo_temperature_pos,
            sapo_temperature_neg,
        )
    )
    if policy_mask is not None:
        per_token_policy = torch.where(policy_mask.bool(), per_token_policy, 0.0)

    kl = None
    if per_token_kl is not None:
        kl = torch.where(mask, at_least_float32(per_token_kl), 0.0)
    elif ref_per_token_logps is not None:
        ref_logps = torch.where(mask, at_least_float32(ref_per_token_logps.detach()), 0.0)
        kl = k3(logps, ref_logps)

    length = per_token_logps.shape[1] if max_completion_length is None else max_completion_length
    if length < 1 and reduction == 'dr_grpo':
        raise ValueError(f'max_completion_length must be at least 1, got {length}')
    active = mask.sum() if num_active_tokens is None else num_active_tokens
    active = torch.as_tensor(active, dtype=torch.float32, device=mask.device)

    def reduce(per_token: Tensor) -> Tensor:
        return REDUCTIONS[reduction](torch.where(mask, per_token, 0.0), mask, length, active)

    policy_term = reduce(per_token_policy)
    loss = policy_term if kl is None or beta == 0 else policy_term + beta * reduce(kl)

    low = (ratio < 1 - epsilon_low) & (advantage < 0)
    high = (ratio > 1 + epsilon_high) & (advantage > 0)
    counted = mask
    if importance_sampling_level == 'sequence':
        counted = mask.any(1, keepdim=True)
        low, high = low[:, :1], high[:, :1]
    metrics = {
        'clip_ratio/low_mean': _masked_mean(low, counted),
        'clip_ratio/high_mean': _masked_mean(high, counted),
        'clip_ratio/region_mean': _masked_mean(low | high, counted),
        'policy_term': policy_term.detach(),
    }
    if kl is not None:
        metrics['kl'] = _masked_mean(kl, mask)
    return loss, metrics


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Schulman's estimate of KL(π ‖ π_ref) per sampled token: ``exp(d) - d - 1``, never negative.

    Args:
        logps: logπ of the sampled tokens, any shape.
        ref_logps: logπ_ref of the same tokens.

    Returns:
        Same shape; ``d = ref_logps - logps`` clamped to ±20, since it overflows otherwise.
    """
    d = (ref_logps - logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(d) - d


def gaussian_logprob(z: Tensor, mean: Tensor, sigma: Tensor | float, dims: str = 'sum') -> Tensor:
    """Log-density of the Gaussian ``[SEG]`` action up to a constant: ``-‖z-μ‖²/(2σ²)``.

    The constant (d·log σ and the like) cancels in every ratio as long as σ is the same on both
    sides.

    Args:
        z: ``(..., d)`` the sampled action. It is data: no gradient flows into it, or a
            reparametrised ``z = μ + σε`` would cancel the gradient of μ.
        mean: ``(..., d)`` μ, with gradient.
        sigma: σ > 0, a number or a tensor that broadcasts to ``(..., d)``.
        dims: ``'sum'``, the density; or ``'mean'`` over the d dimensions, which tempers the ratio
            as a sequence-level ratio does over tokens (for ``num_iterations > 1``, where a sum of
            256 terms leaves the clip range at once).

    Returns:
        ``(...)``, float32 at least.
    """
    return -_half_squares(z.detach(), mean, sigma, dims)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, sigma: Tensor | float, dims: str = 'sum') -> Tensor:
    """KL between two Gaussians of the same σ, in closed form: ``‖μ-μ_ref‖²/(2σ²)``.

    Args:
        mean: ``(..., d)`` μ, with gradient.
        ref_mean: ``(..., d)`` the reference's, without.
        sigma: σ > 0, a number or a tensor that broadcasts to ``(..., d)``.
        dims: ``'sum'`` or ``'mean'`` over d, as in :func:`gaussian_logprob`.

    Returns:
        ``(...)``, float32 at least.
    """
    return _half_squares(ref_mean.detach(), mean, sigma, dims)


def _half_squares(point: Tensor, mean: Tensor, sigma: Tensor | float, dims: str) -> Tensor:
    if dims not in ('sum', 'mean'):
        raise ValueError(f'dims={dims!r} is unknown: use one of sum, mean')
    if point.shape != mean.shape:
        raise ValueError(f'shapes differ: {tuple(point.shape)} and mean {tuple(mean.shape)}')
    if isinstance(sigma, Tensor):
        sigma = at_least_float32(sigma.detach())
    elif sigma <= 0:
        raise ValueError(f'sigma must be positive, got {sigma}')
    halves = ((at_least_float32(point) - at_least_float32(mean)) / sigma) ** 2 / 2
    return halves.sum(-1) if dims == 'sum' else halves.mean(-1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    kept = torch.where(mask, values.detach().float(), 0.0)
    return kept.sum() / mask.sum().clamp(min=1)


def _check_shapes(per_token_logps: Tensor, advantages: Tensor, **others: Tensor | None) -> None:
    shape = tuple(per_token_logps.shape)
    if len(shape) != 2:
        raise ValueError(f'per_token_logps must be (B*G, T), got {shape}')
    for name, tensor in others.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f'{name} is {tuple(tensor.shape)}, per_token_logps {shape}')
    if tuple(advantages.shape) != shape[:1]:
        raise ValueError(
            f'advantages is {tuple(advantages.shape)}, one per completion would be {shape[:1]}'
        )
