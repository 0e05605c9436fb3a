"""Sampling completions, and the log-probs of what was sampled.

The prompt's keys and values are computed once and shared by the G completions of its group, in
sampling and in the training pass, where gradients flow back through them. Everything here runs the
policy in eval mode: dropout would make the log-probs of the two passes disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..datasets.prompts import STOP_STRINGS, clean_caption, truncate_at_stop
from ..losses import chunked_logprobs
from .video_llava_sam import VideoLLaVASAMModel

#: Once this share of a batch has ended, the sequences that go on are gathered into a smaller one.
_COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: Longest completion.
        temperature: Divides the logits, > 0.
        top_p: Nucleus; 1 keeps all.
        top_k: Most likely tokens that are kept; 0 keeps all.
        stop_strings: Texts that end a completion, each by itself.

    Raises:
        ValueError: A number is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: tuple[str, ...] = STOP_STRINGS

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f'max_new_tokens must be at least 1, got {self.max_new_tokens}')
        if not self.temperature > 0:
            raise ValueError(f'temperature must be positive, got {self.temperature}')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'top_p must lie in (0, 1], got {self.top_p}')
        if self.top_k < 0:
            raise ValueError(f'top_k must not be negative, got {self.top_k}')

    def warpers(self) -> LogitsProcessorList:
        """What cuts the distribution after the temperature."""
        warpers = LogitsProcessorList()
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


@dataclass(frozen=True, eq=False)
class Completions:
    """N = B*G sampled completions, the G of a prompt side by side.

    Args:
        ids: ``(N, T)`` int64, padded behind each end.
        mask: ``(N, T)`` bool, through the token that completes the first stop.
        logps: ``(N, T)`` float32: log-probs under the temperature-scaled softmax, before any top-k
            or top-p cut; 0 outside the mask.
        texts: N captions, cleaned of markers.
        truncated: ``(N,)`` bool, the length limit ended it.
    """

    ids: Tensor
    mask: Tensor
    logps: Tensor
    texts: list[str]
    truncated: Tensor


def get_token_logprobs(generate_output: Any, temperature: float = 1.0) -> Tensor:
    """Log-probs of the tokens that transformers' ``generate`` produced.

    Args:
        generate_output: Of ``generate(..., return_dict_in_generate=True)`` with
            ``output_logits=True`` (raw logits, which are divided by ``temperature`` here) or
            ``output_scores=True`` (already scaled by it, and cut by top-k and top-p where used).
        temperature: The temperature of the sampling; applied to raw logits only.

    Returns:
        ``(B, T_new)`` float32; ``(B, 0)`` where nothing was generated.

    Raises:
        ValueError: The output has neither logits nor scores.
    """
    logits = getattr(generate_output, 'logits', None)
    raw = logits is not None
    steps = logits if raw else getattr(generate_output, 'scores', None)
    sequences = generate_output.sequences
    if steps is None:
        raise ValueError('generate needs output_logits=True or output_scores=True')
    if len(steps) == 0:
        return torch.zeros(len(sequences), 0, device=sequences.device)
    # With inputs_embeds the sequences are the new tokens alone, with input_ids the prompt too.
    new = sequences[:, sequences.shape[1] - len(steps) :]
    columns = []
    for step, tokens in zip(steps, new.unbind(1), strict=True):
        step = step.float() / temperature if raw else step.float()
        columns.append(step.log_softmax(dim=-1).gather(1, tokens[:, None]))
    return torch.cat(columns, dim=1)


@torch.no_grad()
def sample_completions(
    policy: VideoLLaVASAMModel,
    prompt_embeds: Tensor,
    prompt_mask: Tensor,
    num_generations: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Completions:
    """Draws G completions of each prompt, with one prefill a prompt.

    Tokens without text (image and mask markers, padding rows of the vocabulary) are never drawn.
    Sequences that have ended leave the batch.

    Args:
        policy: In eval mode.
        prompt_embeds: ``(B, N, D)``, padded on the left.
        prompt_mask: ``(B, N)`` bool.
        num_generations: G.
        sampling: How.
        generator: Source of randomness; torch's default where ``None``.
    """
    tokenizer, device = policy.tokenizer, prompt_embeds.device
    count = len(prompt_embeds) * num_generations
    hidden, cache = _prefill(policy, prompt_embeds, prompt_mask)
    cache.batch_repeat_interleave(num_generations)
    hidden = hidden.repeat_interleave(num_generations, dim=0)
    mask = prompt_mask.long().repeat_interleave(num_generations, dim=0)
    banned = textless_tokens(policy, device)
    warpers = sampling.warpers()
    eos = policy.eos_token_id

    ids = torch.full((count, sampling.max_new_tokens), policy.pad_token_id, device=device)
    logps = torch.zeros(count, sampling.max_new_tokens, device=device)
    rows = torch.arange(count, device=device)  # which sequence each row of the batch is
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    steps = 0
    for step in range(sampling.max_new_tokens):
        logits = policy.lm_head(hidden).float() / sampling.temperature
        allowed = warpers(ids[rows, :step], logits.masked_fill(banned, float('-inf')))
        tokens = torch.multinomial(allowed.softmax(-1), 1, generator=generator)
        chosen = logits.log_softmax(-1).gather(1, tokens).squeeze(1)
        tokens = tokens.squeeze(1)
        going = ~ended[rows]
        ids[rows[going], step] = tokens[going]
        logps[rows[going], step] = chosen[going]
        steps = step + 1
        for row in rows[going].tolist():
            ended[row] = _has_ended(ids[row, :steps], tokenizer, sampling.stop_strings, eos)
        if ended.all() or steps == sampling.max_new_tokens:
            break
        keep = ~ended[rows]
        if keep.float().mean() < _COMPACT_BELOW:
            cache.batch_select_indices(keep)
            rows, mask, tokens = rows[keep], mask[keep], tokens[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = _step(policy, tokens, mask, cache)
    ids, logps = ids[:, :steps], logps[:, :steps]
    texts, completion_mask = truncate_at_stop(ids, tokenizer, sampling.stop_strings)
    return Completions(
        ids=ids,
        mask=completion_mask,
        logps=logps.masked_fill(~completion_mask, 0.0),
        texts=[clean_caption(text) for text in texts],
        truncated=~ended,
    )


def completion_logps(
    policy: VideoLLaVASAMModel,
    prompt_embeds: Tensor,
    prompt_mask: Tensor,
    completions: Completions,
    temperature: float,
    *,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of sampled completions, with gradient to the policy, prompts included.

    Args:
        policy: In eval mode.
        prompt_embeds: ``(B, N, D)``, padded on the left; B divides the number of completions.
        prompt_mask: ``(B, N)`` bool.
        completions: N = B*G of them.
        temperature: Of the sampling.
        return_entropy: Also compute the entropy of every position.

    Returns:
        ``(N, T)`` float32, and the entropy ``(N, T)`` or ``None``.
    """
    group = len(completions.ids) // len(prompt_embeds)
    last, cache = _prefill(policy, prompt_embeds, prompt_mask)
    hidden = last.repeat_interleave(group, dim=0)[:, None]
    if completions.ids.shape[1] > 1:
        cache.batch_repeat_interleave(group)
        mask = prompt_mask.repeat_interleave(group, dim=0)
        mask = torch.cat([mask, completions.mask[:, :-1]], dim=1).long()
        embeds = policy.language_model.get_input_embeddings()(completions.ids[:, :-1])
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        after = policy.decode(embeds, mask, positions, cache).last_hidden_state
        hidden = torch.cat([hidden, after], dim=1)
    head = policy.lm_head
    result = chunked_logprobs(
        hidden,
        head.weight,
        getattr(head, 'bias', None),
        targets=completions.ids,
        temperature=temperature,
        return_entropy=return_entropy,
    )
    return result if return_entropy else (result, None)


def _prefill(
    policy: VideoLLaVASAMModel, embeds: Tensor, mask: Tensor
) -> tuple[Tensor, DynamicCache]:
    """Hidden state ``(B, D)`` at the last token of each prompt, and the prompts' cache."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    out = policy.decode(embeds, mask.long(), positions, DynamicCache())
    return out.last_hidden_state[:, -1], out.past_key_values


def _step(policy: VideoLLaVASAMModel, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    embeds = policy.language_model.get_input_embeddings()(tokens[:, None])
    positions = mask.sum(1, keepdim=True) - 1
    return policy.decode(embeds, mask, positions, cache).last_hidden_state[:, -1]


def textless_tokens(policy: VideoLLaVASAMModel, device: torch.device | None = None) -> Tensor:
    """``(V,)`` bool: markers of images and masks, and rows of the vocabulary without a token."""
    banned = torch.zeros(policy.lm_head.weight.shape[0], dtype=torch.bool, device=device)
    banned[list(policy.special_token_ids.values())] = True
    banned[len(policy.tokenizer) :] = True
    return banned


def _has_ended(
    ids: Tensor, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], eos: int | None
) -> bool:
    if eos is not None and ids[-1] == eos:
        return True
    # Every token is a byte at least, so a stop that ends here lies within so many tokens.
    width = max(len(stop.encode()) for stop in stop_strings)
    tail = tokenizer.decode(ids[-width:].tolist())
    return any(stop in tail for stop in stop_strings)
