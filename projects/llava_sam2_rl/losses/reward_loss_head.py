"""From rewards to the loss: advantages, what is left out, the clipped objective, and its logs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from projects.llava_sam2_rl.losses.advantages import (
    AGGREGATIONS,
    SCALE_REWARDS,
    decoupled_advantages,
    group_advantages,
    group_statistics,
    summed_advantages,
    zero_variance,
)
from projects.llava_sam2_rl.losses.grpo import (
    IMPORTANCE_SAMPLING_LEVELS,
    REDUCTIONS,
    SURROGATES,
    grpo_loss,
    top_entropy_mask,
)
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.rewards.base import RewardOutput
from projects.llava_sam2_rl.utils.devices import to_device


@MODELS.register_module()
class RewardLossHead(nn.Module):
    """Rewards of N = B*G completions -> group advantages -> GRPO loss and its log keys.

    It has no parameters. With several iterations over the same rollouts it is called once per
    iteration with the same rewards.

    Args:
        num_generations: Number of completions per prompt, G. Defaults to 4.
        reduction: How per-token losses become one number: ``'grpo'``, ``'bnpo'``, ``'dr_grpo'`` or
            ``'dapo'``, see :mod:`.grpo`. Defaults to ``'grpo'``.
        epsilon_low: Lower clip range of the importance ratio. Defaults to 0.2.
        epsilon_high: Upper clip range of the importance ratio; DAPO takes 0.28. Defaults to
            ``None``: ``epsilon_low``.
        beta: Weight of the KL to the reference; with 0 no reference is needed. Defaults to 0.1.
        scale_rewards: What centred rewards are divided by: the standard deviation of the
            ``'group'`` or of the ``'batch'``, or ``'none'``, see :func:`.group_advantages`.
            Defaults to ``'group'``.
        importance_sampling_level: One importance ratio per ``'token'`` or per ``'sequence'``.
            Defaults to ``'token'``.
        entropy_coef: Weight of the entropy bonus (its mean over active tokens is subtracted from
            the loss). Defaults to 0.
        drop_zero_variance_groups: Leaves groups whose rewards are all equal out of the loss, KL
            and normaliser included. Their advantages are 0 either way. Defaults to False.
        drop_truncated: Leaves completions that hit the length limit out of the loss. They still
            count in their group's statistics. Defaults to False.
        max_completion_length: Most tokens of a completion, ``dr_grpo``'s constant. Defaults to
            ``None``: the width of the given batch.
        multi_objective_aggregation: How several rewards become one advantage:
            ``'sum_then_normalize'``, or ``'normalize_then_sum'``: each is normalised in its group
            for itself, and their weighted sum over the batch (GDPO), whatever ``scale_rewards``
            says; see :func:`.decoupled_advantages`. Defaults to ``'sum_then_normalize'``.
        surrogate: What is maximised of each token: ``'clip'``, ``'cispo'`` or ``'sapo'``, see
            `SURROGATES` in :mod:`.grpo`. Defaults to ``'clip'``.
        sapo_temperature_pos: τ of SAPO for positive advantages, > 0. Defaults to 1.0.
        sapo_temperature_neg: τ of SAPO for the others, > 0. Defaults to 1.05.
        top_entropy_quantile: Share of the tokens, those of the highest entropy, that the policy
            gradient is taken of, in (0, 1]; see :func:`.top_entropy_mask`. The KL is of all.
            Defaults to 1.0.

    Raises:
        ValueError: An option is unknown or out of range; G = 1 with group scaling.
    """

    def __init__(
        self,
        num_generations: int = 4,
        reduction: str = 'grpo',
        epsilon_low: float = 0.2,
        epsilon_high: float | None = None,
        beta: float = 0.1,
        scale_rewards: str = 'group',
        importance_sampling_level: str = 'token',
        entropy_coef: float = 0.0,
        drop_zero_variance_groups: bool = False,
        drop_truncated: bool = False,
        max_completion_length: int | None = None,
        multi_objective_aggregation: str = 'sum_then_normalize',
        surrogate: str = 'clip',
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        top_entropy_quantile: float = 1.0,
    ) -> None:
        super().__init__()
        epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
        for option, value, valid in (
            ('reduction', reduction, tuple(REDUCTIONS)),
            ('scale_rewards', scale_rewards, SCALE_REWARDS),
            ('importance_sampling_level', importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS),
            ('multi_objective_aggregation', multi_objective_aggregation, AGGREGATIONS),
            ('surrogate', surrogate, tuple(SURROGATES)),
        ):
            if value not in valid:
                raise ValueError(f'{option}={value!r} is unknown: use one of {", ".join(valid)}')
        for option, number in (
            ('epsilon_low', epsilon_low),
            ('epsilon_high', epsilon_high),
            ('beta', beta),
            ('entropy_coef', entropy_coef),
        ):
            if number < 0:
                raise ValueError(f'{option} must not be negative, got {number}')
        if sapo_temperature_pos <= 0 or sapo_temperature_neg <= 0:
            raise ValueError(
                f'sapo_temperature_pos={sapo_temperature_pos} and sapo_temperature_neg='
                f'{sapo_temperature_neg} must be positive'
            )
        if not 0 < top_entropy_quantile <= 1:
            raise ValueError(f'top_entropy_quantile must lie in (0, 1], got {top_entropy_quantile}')
        decoupled = multi_objective_aggregation == 'normalize_then_sum'
        if num_generations < 2 and (scale_rewards == 'group' or decoupled):
            option = (
                f'multi_objective_aggregation={multi_objective_aggregation!r}'
                if decoupled
                else f'scale_rewards={scale_rewards!r}'
            )
            raise ValueError(f'{option} needs num_generations >= 2, got {num_generations}')
        self.num_generations = num_generations
        self.reduction = reduction
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.beta = beta
        self.scale_rewards = scale_rewards
        self.importance_sampling_level = importance_sampling_level
        self.entropy_coef = entropy_coef
        self.drop_zero_variance_groups = drop_zero_variance_groups
        self.drop_truncated = drop_truncated
        self.max_completion_length = max_completion_length
        self.decoupled = decoupled
        self.surrogate = surrogate
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.top_entropy_quantile = top_entropy_quantile

    @property
    def divides_by_batch(self) -> bool:
        """Whether advantages depend on the rewards of the whole batch, those of all ranks."""
        return self.decoupled or self.scale_rewards == 'batch'

    def scaled_by_batch(self, rewards: RewardOutput) -> Tensor:
        """``(N,)``, NaN = unscorable: what is divided by its standard deviation over all ranks."""
        if not self.decoupled:
            return rewards.rewards
        return summed_advantages(rewards.addends, rewards.weights, self.num_generations)

    def advantages(self, rewards: RewardOutput | Tensor, batch_std: Tensor | None = None) -> Tensor:
        """``(N,)`` advantages, 0 where a reward is unscorable.

        Args:
            rewards: Of the N completions, or just ``(N,)``; NaN = unscorable.
            batch_std: Scalar: standard deviation of :meth:`scaled_by_batch` over all ranks;
                ``None`` where the rewards are all there are.
        """
        values = rewards.rewards if isinstance(rewards, RewardOutput) else rewards
        if not self.decoupled:
            return group_advantages(values, self.num_generations, self.scale_rewards, batch_std)
        terms, weights = _terms(rewards)
        return decoupled_advantages(terms, weights, self.num_generations, batch_std)

    def zero_variance(self, rewards: RewardOutput | Tensor) -> Tensor:
        """``(N,)`` bool: completions of groups without two different scorable rewards.

        Every advantage in such a group is 0. Rewards that are equal only as a sum still differ
        where each is normalised for itself.
        """
        values = rewards.rewards if isinstance(rewards, RewardOutput) else rewards
        terms = _terms(rewards)[0] if self.decoupled else values[:, None]
        flat = [zero_variance(column, self.num_generations) for column in terms.unbind(1)]
        return torch.stack(flat).all(0)

    def loss_mask(
        self,
        rewards: RewardOutput | Tensor,
        completion_mask: Tensor,
        truncated: Tensor | None = None,
    ) -> Tensor:
        """``(N, T)`` bool: the tokens of the completions that are not left out.

        Its sum is what ranks add up for ``num_active_tokens`` of ``dapo``.

        Raises:
            ValueError: ``drop_truncated`` without ``truncated``.
        """
        keep = torch.ones(len(completion_mask), dtype=torch.bool, device=completion_mask.device)
        if self.drop_truncated:
            if truncated is None:
                raise ValueError('drop_truncated=True needs to know which ones: pass truncated')
            keep &= ~truncated.to(keep)
        if self.drop_zero_variance_groups:
            keep &= ~self.zero_variance(rewards).to(keep)
        return completion_mask.bool() & keep[:, None]

    def forward(
        self,
        per_token_logps: Tensor,
        old_per_token_logps: Tensor | None,
        ref_per_token_logps: Tensor | None,
        completion_mask: Tensor,
        rewards: RewardOutput | Tensor,
        *,
        entropy: Tensor | None = None,
        truncated: Tensor | None = None,
        num_active_tokens: Tensor | float | None = None,
        per_token_kl: Tensor | None = None,
        reward_std: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and log values.

        Args:
            per_token_logps: ``(N, T)`` with gradient.
            old_per_token_logps: ``(N, T)`` or ``None`` on-policy.
            ref_per_token_logps: ``(N, T)`` or ``None`` without KL.
            completion_mask: ``(N, T)``, 1 = counts.
            rewards: Of the N completions, with their parts or just ``(N,)``; NaN = unscorable.
            entropy: ``(N, T)`` of the policy's distributions, with gradient if it is rewarded;
                ``None`` = not known, not logged.
            truncated: ``(N,)`` bool, the completion hit the length limit.
            num_active_tokens: See :func:`.grpo_loss`; count :meth:`loss_mask`.
            per_token_kl: See :func:`.grpo_loss`.
            reward_std: See :meth:`advantages`, ``batch_std``.

        Returns:
            A scalar, and detached float32 scalars without a direction's prefix: ``reward``,
            ``reward_std``, ``frac_reward_zero_std``, ``frac_reward_unscorable``,
            ``num_groups_unscorable``, ``rewards/{name}/mean`` and ``/std`` (of scorable ones),
            ``rewards/{name}/frac_unscorable`` (share of completions that this part declined),
            ``kl``, ``entropy``, ``clip_ratio/*``, ``completions/{mean,min,max}_length``,
            ``completions/clipped_ratio`` (needs ``truncated``), ``policy_term``. A mean over
            nothing is NaN: average logs over steps accordingly.

        Raises:
            ValueError: Shapes disagree, or an option needs an argument that is missing.
        """
        parts = rewards if isinstance(rewards, RewardOutput) else None
        values = rewards.rewards if isinstance(rewards, RewardOutput) else rewards
        values = values.detach()
        if len(values) != len(per_token_logps):
            raise ValueError(f'{len(values)} rewards for {len(per_token_logps)} completions')
        if self.entropy_coef > 0 and entropy is None:
            raise ValueError(f'entropy_coef={self.entropy_coef} needs the entropy: pass entropy')
        if self.top_entropy_quantile < 1 and entropy is None:
            raise ValueError(
                f'top_entropy_quantile={self.top_entropy_quantile} needs the entropy: pass entropy'
            )
        mask = self.loss_mask(rewards, completion_mask, truncated)
        policy_mask = None
        if self.top_entropy_quantile < 1 and entropy is not None:
            policy_mask = top_entropy_mask(entropy, mask, self.top_entropy_quantile)
        loss, metrics = grpo_loss(
            per_token_logps,
            old_per_token_logps,
            ref_per_token_logps,
            to_device(self.advantages(rewards, reward_std), per_token_logps.device),
            mask,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            beta=self.beta,
            reduction=self.reduction,
            importance_sampling_level=self.importance_sampling_level,
            max_completion_length=self.max_completion_length,
            num_active_tokens=num_active_tokens,
            per_token_kl=per_token_kl,
            surrogate=self.surrogate,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            policy_mask=policy_mask,
        )
        if entropy is not None:
            if entropy.shape != mask.shape:
                raise ValueError(f'entropy is {tuple(entropy.shape)}, mask {tuple(mask.shape)}')
            mean = torch.where(mask, entropy.float(), 0.0).sum() / mask.sum().clamp(min=1)
            metrics['entropy'] = mean.detach()
            if self.entropy_coef > 0:
                loss = loss - self.entropy_coef * mean
        metrics |= group_statistics(values, self.num_generations)
        metrics |= _length_statistics(completion_mask, truncated)
        if parts is not None:
            metrics |= _part_statistics(parts)
        return loss, metrics


def _terms(rewards: RewardOutput | Tensor) -> tuple[Tensor, tuple[float, ...]]:
    """Rewards that are added up, ``(N, M)``, and their M weights."""
    if isinstance(rewards, RewardOutput):
        return rewards.addends, rewards.weights
    return rewards[:, None], (1.0,)


def _length_statistics(completion_mask: Tensor, truncated: Tensor | None) -> dict[str, Tensor]:
    lengths = completion_mask.bool().sum(1).float()
    stats = {
        'completions/mean_length': lengths.mean(),
        'completions/min_length': lengths.min(),
        'completions/max_length': lengths.max(),
    }
    if truncated is not None:
        stats['completions/clipped_ratio'] = truncated.float().mean()
    return stats


def _part_statistics(parts: RewardOutput) -> dict[str, Tensor]:
    stats = {}
    for name, column in zip(parts.names, parts.rewards_per_func.unbind(1), strict=True):
        scorable = column[~column.isnan()]
        stats[f'rewards/{name}/mean'] = scorable.mean()
        # One value has no spread, as against no value at all.
        stats[f'rewards/{name}/std'] = scorable.std(unbiased=len(scorable) > 1)
        stats[f'rewards/{name}/frac_unscorable'] = column.isnan().float().mean()
    return stats
