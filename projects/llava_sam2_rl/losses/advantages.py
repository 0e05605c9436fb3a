"""Group-relative advantages: how much better a completion did than the others of its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Added to the standard deviation before dividing, as GRPO's reference implementation does.
STD_EPS = 1e-4
SCALE_REWARDS = ('group', 'batch', 'none')
#: How several rewards become one advantage; the names are TRL's.
AGGREGATIONS = ('sum_then_normalize', 'normalize_then_sum')


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    scale_rewards: str = 'group',
    reward_std: Tensor | None = None,
) -> Tensor:
    """Advantage of every completion over its group: ``A = (r - mean_g) / (std + 1e-4)``.

    A reward of NaN means "could not be scored": that completion gets advantage 0 and takes no part
    in any mean or standard deviation. So does the only scorable completion of a group, and every
    completion of a group whose rewards are all equal (exactly 0, whatever the rounding).

    Args:
        rewards: ``(B*G,)`` float, the G completions of a prompt side by side. NaN = unscorable.
        num_generations: G, completions per prompt.
        scale_rewards: What the centred reward is divided by. ``'group'``: the standard deviation
            (Bessel's correction) of its group's scorable rewards. ``'batch'``: that of all
            scorable rewards given. ``'none'``: nothing.
        reward_std: Scalar, what ``'batch'`` divides by where the rewards given are only a part of
            the batch (the others lie on other ranks).

    Returns:
        ``(B*G,)`` in the rewards' dtype, never NaN, no gradient.

    Raises:
        ValueError: An option is unknown, B*G is no multiple of G, a reward is infinite, or G is 1
            with ``scale_rewards='group'``.
    """
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(
            f'scale_rewards={scale_rewards!r} is unknown: use one of {", ".join(SCALE_REWARDS)}'
        )
    grouped, scorable = _groups(rewards, num_generations)
    if scale_rewards == 'group' and num_generations == 1:
        raise ValueError(
            "scale_rewards='group' needs num_generations >= 2, got 1: a group of one has no "
            'standard deviation and every advantage would be 0'
        )
    mean, std = _moments(grouped, scorable)
    centred = grouped - mean[:, None]
    if scale_rewards == 'group':
        centred = centred / (std[:, None] + STD_EPS)
    elif scale_rewards == 'batch':
        if reward_std is None:
            _, reward_std = _moments(grouped.reshape(1, -1), scorable.reshape(1, -1))
        centred = centred / (reward_std.to(centred) + STD_EPS)
    teaches = scorable & ~_all_equal(grouped, scorable)[:, None]
    return torch.where(teaches, centred, 0.0).reshape(-1).to(rewards.dtype)


def summed_advantages(terms: Tensor, weights: Sequence[float], num_generations: int) -> Tensor:
    """GDPO's advantages before the last division: each reward is normalised for itself.

    ``sum_k w_k (r_k - mean_g(r_k)) / (std_g(r_k) + 1e-4)`` (Liu et al. 2026, "GDPO: Group
    reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization"). Of a
    weighted sum that is normalised as a whole, a reward that hardly varies is drowned by one that
    varies much, whatever the weights.

    Args:
        terms: ``(B*G, K)`` float, the rewards that are added up. NaN = that one declined, and
            contributes 0.
        weights: K weights.
        num_generations: G.

    Returns:
        ``(B*G,)`` float64 without gradient; NaN where all rewards declined.

    Raises:
        ValueError: As :func:`group_advantages`; or not one weight per reward.
    """
    if terms.ndim != 2 or terms.shape[1] != len(weights):
        raise ValueError(
            f'terms is {tuple(terms.shape)}: one column for each of {len(weights)} weights'
        )
    columns = [group_advantages(column.double(), num_generations) for column in terms.unbind(1)]
    total = torch.stack([w * column for w, column in zip(weights, columns, strict=True)]).sum(0)
    return total.masked_fill(terms.isnan().all(1), torch.nan)


def decoupled_advantages(
    terms: Tensor,
    weights: Sequence[float],
    num_generations: int,
    batch_std: Tensor | None = None,
) -> Tensor:
    """GDPO's advantages: :func:`summed_advantages` over their standard deviation in the batch.

    Their mean is 0 in every group already, so that the paper's subtraction of the batch's mean
    changes nothing.

    Args:
        terms, weights, num_generations: As there.
        batch_std: Scalar, the standard deviation where the terms given are only a part of the batch
            (the others lie on other ranks).

    Returns:
        ``(B*G,)`` in the terms' dtype, never NaN, no gradient.

    Raises:
        ValueError: As there.
    """
    summed = summed_advantages(terms, weights, num_generations)
    scorable = ~summed.isnan()
    if batch_std is None:
        _, stds = _moments(summed.reshape(1, -1), scorable.reshape(1, -1))
        batch_std = stds[0]
    scaled = summed / (batch_std.to(summed) + STD_EPS)
    return torch.where(scorable, scaled, 0.0).to(terms.dtype)


def group_statistics(rewards: Tensor, num_generations: int) -> dict[str, Tensor]:
    """What logs say about the rewards of one step.

    Args:
        rewards: ``(B*G,)`` float, NaN = unscorable.
        num_generations: G.

    Returns:
        Scalars, float32: ``reward`` mean over the scorable completions (NaN if there is none),
        ``reward_std`` mean over groups of the standard deviation inside the group (groups with at
        least two scorable completions; NaN if there is none), ``frac_reward_zero_std`` share of
        all groups that have scorable completions but no difference between them (they teach
        nothing), ``frac_reward_unscorable`` share of completions without a reward,
        ``num_groups_unscorable`` count of groups without any.

    Raises:
        ValueError: As :func:`group_advantages`.
    """
    grouped, scorable = _groups(rewards, num_generations)
    _, std = _moments(grouped, scorable)
    count = scorable.sum(1)
    stats = {
        'reward': grouped[scorable].mean(),
        'reward_std': std[count > 1].mean(),
        'frac_reward_zero_std': (_all_equal(grouped, scorable) & (count > 0)).double().mean(),
        'frac_reward_unscorable': (~scorable).double().mean(),
        'num_groups_unscorable': (count == 0).sum(),
    }
    return {name: value.float() for name, value in stats.items()}


def zero_variance(rewards: Tensor, num_generations: int) -> Tensor:
    """Which completions belong to a group without two different scorable rewards.

    Args:
        rewards: ``(B*G,)`` float, NaN = unscorable.
        num_generations: G.

    Returns:
        ``(B*G,)`` bool.
    """
    grouped, scorable = _groups(rewards, num_generations)
    return _all_equal(grouped, scorable).repeat_interleave(num_generations)


def _groups(rewards: Tensor, num_generations: int) -> tuple[Tensor, Tensor]:
    """Rewards as ``(B, G)`` float64 (rounding then stays far below eps), and which are scorable."""
    if num_generations < 1:
        raise ValueError(f'num_generations must be at least 1, got {num_generations}')
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(
            f'rewards must be a flat float tensor (B*G,), got {tuple(rewards.shape)} '
            f'{rewards.dtype}'
        )
    if len(rewards) % num_generations:
        raise ValueError(
            f'{len(rewards)} rewards do not divide into groups of num_generations={num_generations}'
        )
    if rewards.isinf().any():
        raise ValueError(
            f'{int(rewards.isinf().sum())} of {len(rewards)} rewards are infinite: a reward that '
            'cannot be scored is NaN (None from a reward function)'
        )
    grouped = rewards.detach().double().reshape(-1, num_generations)
    return grouped, ~grouped.isnan()


def _moments(grouped: Tensor, scorable: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Bessel-corrected standard deviation of every row's scorable entries."""
    count = scorable.sum(1)
    mean = torch.where(scorable, grouped, 0.0).sum(1) / count.clamp(min=1)
    squares = torch.where(scorable, (grouped - mean[:, None]) ** 2, 0.0).sum(1)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()


def _all_equal(grouped: Tensor, scorable: Tensor) -> Tensor:
    """Per row: fewer than two different scorable entries."""
    if grouped.numel() == 0:
        return torch.ones(len(grouped), dtype=torch.bool, device=grouped.device)
    low = torch.where(scorable, grouped, torch.inf).amin(1)
    high = torch.where(scorable, grouped, -torch.inf).amax(1)
    return low >= high
