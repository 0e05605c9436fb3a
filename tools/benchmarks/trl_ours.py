"""GRPO on prompts of text by the package's own parts: what `trl_step` compares with TRL.

The sampler, the tree of sequences with common beginnings, log-probs, the teacher, the loss and the
training step are those of a run. What is left out is what text does not have: images in a prompt,
and masks that a return trip finds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.engine.timing import phase
from projects.llava_sam2_rl.models import GRPOObjective, Rollout, sample_completions
from projects.llava_sam2_rl.models.generation import Completions
from projects.llava_sam2_rl.models.objectives.base import with_prefix
from projects.llava_sam2_rl.models.objectives.rollouts import renamed, score_rollouts
from projects.llava_sam2_rl.models.prefix_tree import PrefixTree
from projects.llava_sam2_rl.models.shared_prefix import (
    CompletionHandles,
    add_completions,
    completion_logps,
)
from projects.llava_sam2_rl.prompts import encode_text
from projects.llava_sam2_rl.rewards import RolloutBatch
from projects.llava_sam2_rl.utils.modules import eval_mode


@dataclass(frozen=True)
class TextBatch:
    """B prompts, with what `DualLoopModel` and its objective ask of a batch."""

    texts: list[str]
    #: Conversations, of which there are none.
    chats: tuple[int, ...] = ()

    @property
    def regions(self) -> list[int]:
        """All of them are sampled from."""
        return list(range(len(self.texts)))

    def subset(self, indices: Sequence[int]) -> TextBatch:
        """Some of them."""
        return TextBatch([self.texts[i] for i in indices])


class TextReward:
    """A function of the texts."""

    name = 'text'

    def __init__(self, function: Callable[[Sequence[str]], list[float]]) -> None:
        self.function = function

    def __call__(self, rollouts: RolloutBatch) -> list[float]:
        """Scores of the completions."""
        return self.function(rollouts.required('completions', self))


class TextGRPO(GRPOObjective):
    """`GRPOObjective` whose prompts are text and whose completions all have the full length.

    Args:
        num_generations: G.
        beta: Weight of the KL to the teacher.
        function: Scores texts.
    """

    def __init__(
        self, num_generations: int, beta: float, function: Callable[[Sequence[str]], list[float]]
    ) -> None:
        # A mean over the tokens of the batch, as TRL has it.
        super().__init__(num_generations, beta, reduction='bnpo')
        self.reward = TextReward(function)

    def setup(self, policy: Any, directions: Collection[Any], max_new_tokens: int) -> None:
        """No completion ends before it has ``max_new_tokens``.

        A stop text could be made of other tokens than those that are held back, and TRL knows none.
        """
        super().setup(policy, directions, max_new_tokens)
        self.sampling = replace(self.sampling, min_new_tokens=max_new_tokens, stop_strings=())

    def _roll_out(
        self, policy: Any, teacher: Any, batch: Any, directions: Collection[Any]
    ) -> dict[Any, Rollout]:
        embeds = prompt_embeds(policy, batch)
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        drawn = sample_completions(policy, embeds, mask, self.num_generations, self.sampling)
        with phase('return_trip'), teacher.applied_to(policy):
            reference, _ = self._logps(policy, batch, drawn)
        inputs = RolloutBatch(
            completions=drawn.texts,
            num_generations=self.num_generations,
            direction='mask_to_caption',
            completion_lengths=drawn.completion_mask.sum(1).tolist(),
        )
        rollout = Rollout(
            samples=batch.regions,
            captions=drawn.texts,
            completions=drawn,
            ref_per_token_logps=reference,
            reward_inputs=inputs,
            rewards=score_rollouts(self.reward, inputs, {}),
        )
        return {'mask_to_caption': rollout}

    def losses(self, policy: Any, batch: Any, rollouts: Mapping[Any, Rollout]) -> Any:
        """The clipped policy gradient loss of one update, from one pass of the policy."""
        rollout = rollouts['mask_to_caption']
        assert rollout.completions is not None
        with eval_mode(policy):
            with phase('log_probs'):
                logps, entropy = self._logps(policy, batch, rollout.completions)
            found, metrics = self.mask_to_caption.loss(rollout, logps, entropy)
        losses = with_prefix('mask_to_caption', found)
        return losses, with_prefix('mask_to_caption', renamed(metrics))

    def _logps(self, policy: Any, batch: Any, drawn: Completions) -> tuple[Tensor, Tensor | None]:
        """Log-probs ``(N, T)``, as `GRPOObjective._read` asks for them, and the entropy."""
        tree = PrefixTree()
        roots = [tree.add_node(x) for x in prompt_embeds(policy, batch)]
        prompts = [root for root in roots for _ in range(self.num_generations)]
        ids, mask = drawn.completion_ids, drawn.completion_mask
        behind = add_completions(tree, policy, prompts, ids, mask)
        return completion_logps(
            policy,
            tree.forward(policy),
            CompletionHandles(prompts, behind, ids, mask),
            self.sampling.temperature,
            return_entropy=torch.is_grad_enabled(),
            entropy_gradient=False,
        )


def prompt_embeds(policy: Any, batch: TextBatch) -> Tensor:
    """``(B, P, D)`` of prompts that are equally long."""
    ids = torch.tensor([encode_text(policy.tokenizer, text) for text in batch.texts])
    return policy.language_model.get_input_embeddings()(ids.to(policy.device))
