"""Pure tensor math: ``(loss, metrics)`` from tensors, no runner and no other ranks."""

from projects.llava_sam2_rl.losses.advantages import (
    decoupled_advantages,
    group_advantages,
    group_statistics,
)
from projects.llava_sam2_rl.losses.grpo import (
    REDUCTIONS,
    SURROGATES,
    gaussian_kl,
    gaussian_logprob,
    grpo_loss,
    k3,
    top_entropy_mask,
)
from projects.llava_sam2_rl.losses.gumbel import (
    gumbel_embeds,
    length_weights,
    mask_tokens,
)
from projects.llava_sam2_rl.losses.logprobs import chunked_logprobs
from projects.llava_sam2_rl.losses.mask import mask_loss
from projects.llava_sam2_rl.losses.reward_loss_head import RewardLossHead
from projects.llava_sam2_rl.losses.surgery import project_conflicting

__all__ = [
    'REDUCTIONS',
    'SURROGATES',
    'RewardLossHead',
    'chunked_logprobs',
    'decoupled_advantages',
    'gaussian_kl',
    'gaussian_logprob',
    'group_advantages',
    'group_statistics',
    'grpo_loss',
    'gumbel_embeds',
    'k3',
    'length_weights',
    'mask_loss',
    'mask_tokens',
    'project_conflicting',
    'top_entropy_mask',
]
