"""The record of a rollout, from sampling to the loss, and what is asked on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from projects.llava_sam2_rl.engine.timing import phase, phases
from projects.llava_sam2_rl.losses import RewardLossHead
from projects.llava_sam2_rl.models.generation import Completions
from projects.llava_sam2_rl.models.likelihoods import CaptionLikelihoods
from projects.llava_sam2_rl.models.shared_prefix import CompletionHandles, PromptHandles
from projects.llava_sam2_rl.rewards import score
from projects.llava_sam2_rl.rewards.base import (
    Direction,
    Reward,
    RewardOutput,
    RolloutBatch,
    Started,
)

#: What the loss calls it, and what the log does.
_LOG_NAMES = {'reward': 'reward_mean', 'kl': 'kl_div', 'policy_term': 'policy_loss'}


@dataclass(frozen=True, eq=False)
class Rollout:
    """What was sampled in one direction for S samples, N = S·G rollouts, the G of one sample
    side by side, and what every update over them needs. Which fields are set depends on the
    objective; all others are ``None`` or empty.
    """

    #: S indices into the batch.
    samples: Sequence[int]
    #: S indices of the data loader's records that the samples are of, for pictures.
    records: Sequence[int] = ()
    #: S × ``(H, W)`` bool: the samples' regions in the first frame, for pictures.
    regions: Sequence[Tensor] = ()

    # What was written or drawn.
    #: N captions, cleaned of markers: the policy's or, of its masks, the teacher's (GRPO; none
    #: where nobody reads them), or the teacher's with G = 1 (SFT).
    captions: Sequence[str] = ()
    #: ``completion_ids``, ``completion_mask`` ``(N, T)`` of the policy's captions (GRPO).
    completions: Completions | None = None
    #: ``(A, D)`` sampled ``[SEG]`` embeddings (GRPO, caption_to_mask), those of a rollout side by
    #: side. A = N where every caption is answered with one ``[SEG]``.
    actions: Tensor | None = None
    #: ``(A, 1)`` standard deviation of the actions.
    sigma: Tensor | None = None
    #: S lists of token ids that the teacher wrote (Gumbel).
    pseudo_ids: Sequence[list[int]] = ()
    #: The same, some replaced by random tokens: what the policy reads (Gumbel).
    noised_ids: Sequence[list[int]] = ()

    # What old policy and reference say of it.
    #: ``(N, T)``, T the most ``[SEG]`` of an answer for actions: under the policy that sampled.
    #: ``None`` = on-policy.
    old_per_token_logps: Tensor | None = None
    #: ``(N, T)`` under the reference; ``None`` without KL.
    ref_per_token_logps: Tensor | None = None
    #: ``(M, D)`` mean actions under the reference, one for each ``[SEG]`` of the S answers;
    #: ``None`` without KL.
    ref_action_mean: Tensor | None = None
    #: ``(ΣL, V)`` float32 log-probs of whole distributions under the teacher (Gumbel).
    ref_logps: Tensor | None = None

    # How good it was.
    #: What the rewards read, N entries.
    reward_inputs: RolloutBatch | None = None
    #: ``rewards`` ``(N,)`` and ``rewards_per_func`` ``(N, K)``; `scored` where there must be some.
    rewards: RewardOutput | None = None
    #: Scalar: standard deviation over all ranks of what the head divides by it
    #: (`RewardLossHead.scaled_by_batch`); ``None`` where this rank has all.
    reward_std: Tensor | None = None
    #: ``(N,)`` float32.
    advantages: Tensor | None = None
    #: Of the return trip, for the log.
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def scored(self) -> RewardOutput:
        """The rewards of rollouts that have some.

        Raises:
            ValueError: They have none.
        """
        if self.rewards is None:
            raise ValueError('these rollouts have no rewards')
        return self.rewards


@dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """What one pass of the teacher, and of the reference, says of the rollouts."""

    #: ``(N, h, w)`` mask logits of the return trip of N captions.
    low_res: Tensor | None = None
    #: N × ``(1, T, h, w)``, the same in all frames of clips; ``None`` where one was looked at.
    tracks: list[Tensor] | None = None
    #: ``(N, T)`` of the captions, under the reference.
    ref_per_token_logps: Tensor | None = None
    #: ``(S, D)``, under the reference.
    ref_action_mean: Tensor | None = None
    #: What the rewards of each direction ask for.
    likelihoods: dict[Direction, CaptionLikelihoods] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PendingLogps:
    """Prompts queued in a `SharedPrefixForward` whose log-probs and actions are wanted."""

    captions: CompletionHandles | None
    actions: PromptHandles | None


def score_rollouts(reward: Reward, inputs: RolloutBatch, started: Started) -> RewardOutput:
    """What the rewards say, as a phase: it lasts as long as what was started has to be waited for.

    Args:
        reward: Of the direction.
        inputs: N finished rollouts.
        started: What was asked when their captions were written.
    """
    with phase('rewards'):
        rewards = score(reward, inputs, started)
    if started:
        phases.hide('rewards', sum(scores.hidden for scores in started.values()))
    return rewards


def num_loss_items(
    head: RewardLossHead, rollout: Rollout, mask: Tensor, truncated: Tensor | None = None
) -> float:
    """Of how many items a head's loss is the mean: active tokens, or completions.

    A rank's loss over its own active tokens, weighted by their number, is ``dapo``'s sum over the
    active tokens of all ranks. ``bnpo`` stays the mean over each rank's own tokens.

    Args:
        head: Of the direction.
        rollout: Scored.
        mask: ``(N, T)`` bool, the tokens that count.
        truncated: ``(N,)`` bool, the completion hit the length limit; ``None`` for actions.
    """
    if head.reduction != 'dapo':
        return float(len(mask))
    return float(head.loss_mask(rollout.scored, mask, truncated).sum())


def renamed(logs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics of the loss by the names that users of other GRPO trainers look for."""
    return {_LOG_NAMES.get(name, name): value for name, value in logs.items()}
