"""Sampling completions; the pass with gradients over what was sampled is in `reading`.

The prompt's keys and values are computed once and shared by the G completions of its group. The
policy is in eval mode: dropout would make the log-probs of the two passes disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from projects.llava_sam2_rl.engine.timing import phase
from projects.llava_sam2_rl.models.decoding import (
    RowCache,
    StopWatcher,
    direct_linears,
    fast_attention,
)
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.prompts import STOP_STRINGS, clean_caption, truncate_at_stop

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
        greedy: The most likely token instead of a draw.
        min_new_tokens: Before so many tokens no end and no stop text may begin.

    Raises:
        ValueError: A number is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: tuple[str, ...] = STOP_STRINGS
    greedy: bool = False
    min_new_tokens: int = 0

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


@contextmanager
def no_gradient() -> Iterator[None]:
    """`torch.no_grad` after which autocast forgets the weights that were cast inside.

    Autocast keeps its low-precision copy of a weight until it ends. A copy made without a gradient
    would be used by the next pass with one, and the weight would get none, silently.
    """
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()


@no_gradient()
def sample_completions(
    policy: VideoLLaVASAMModel,
    prompt_embeds: Tensor,
    prompt_mask: Tensor,
    num_generations: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    *,
    shared: int = 0,
    sources: Sequence[int] | None = None,
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
        shared: So many positions at the start of prompts of one source are the same (its image),
            and are computed once.
        sources: B numbers: the source of each prompt.
    """
    tokenizer, device = policy.tokenizer, prompt_embeds.device
    batch, length = prompt_mask.shape
    count, limit = batch * num_generations, sampling.max_new_tokens
    with phase('prefill'):
        if shared and sources is not None and len(set(sources)) < batch:
            prompt_embeds, prompt_mask = _start_first(prompt_embeds, prompt_mask, shared)
            last, prompts = _prefill_shared(policy, prompt_embeds, prompt_mask, shared, sources)
        else:
            last, prompts = _prefill(policy, prompt_embeds, prompt_mask)
    # Rows of the decoded batch: which sequence each is.
    rows = torch.arange(count, device=device)
    cache = RowCache(prompts, rows // num_generations, limit)
    del prompts
    hidden = last.repeat_interleave(num_generations, dim=0)
    mask = torch.ones(count, length + limit, dtype=torch.long, device=device)
    mask[:, :length] = prompt_mask.repeat_interleave(num_generations, dim=0)
    lengths = prompt_mask.sum(1).repeat_interleave(num_generations)
    banned = textless_tokens(policy, device)
    ends = _first_tokens(policy, sampling.stop_strings)
    warpers = sampling.warpers()
    watcher = StopWatcher(tokenizer, sampling.stop_strings, policy.eos_token_id, device)
    table = policy.language_model.get_input_embeddings()

    ids = torch.full((count, limit), policy.pad_token_id, device=device)
    logps = torch.zeros(count, limit, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    steps = 0
    with phase('decode'), direct_linears(policy.language_model):
        for step in range(limit):
            logits = policy.lm_head(hidden).float() / sampling.temperature
            allowed = logits.masked_fill(banned, float('-inf'))
            if step < sampling.min_new_tokens:
                allowed[:, ends] = float('-inf')
            if sampling.greedy:
                tokens = allowed.argmax(-1)
            else:
                allowed = warpers(ids[rows, :step], allowed)
                tokens = torch.multinomial(allowed.softmax(-1), 1, generator=generator).squeeze(1)
            chosen = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)
            going = ~ended[rows]
            ids[rows[going], step] = tokens[going]
            logps[rows[going], step] = chosen[going]
            steps = step + 1
            active = rows[going]
            ended[active] = watcher.ended(ids[active, :steps])
            if ended.all() or steps == limit:
                break
            keep = ~ended[rows]
            if keep.float().mean() < _COMPACT_BELOW:
                cache.keep(keep)
                rows, mask, lengths, tokens = rows[keep], mask[keep], lengths[keep], tokens[keep]
            with fast_attention(policy.language_model.config):
                hidden = policy.decode(
                    table(tokens[:, None]),
                    mask[:, : length + steps],
                    lengths[:, None] + step,
                    cache,
                ).last_hidden_state[:, -1]
    ids, logps = ids[:, :steps], logps[:, :steps]
    texts, completion_mask = truncate_at_stop(ids, tokenizer, sampling.stop_strings)
    return Completions(
        ids=ids,
        mask=completion_mask,
        logps=logps.masked_fill(~completion_mask, 0.0),
        texts=[clean_caption(text) for text in texts],
        truncated=~ended,
    )


def _prefill(
    policy: VideoLLaVASAMModel, embeds: Tensor, mask: Tensor
) -> tuple[Tensor, DynamicCache]:
    """Hidden state ``(B, D)`` at the last token of each prompt, and the prompts' cache."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    out = policy.decode(embeds, mask.long(), positions, DynamicCache())
    return out.last_hidden_state[:, -1], out.past_key_values


def _prefill_shared(
    policy: VideoLLaVASAMModel, embeds: Tensor, mask: Tensor, shared: int, sources: Sequence[int]
) -> tuple[Tensor, DynamicCache]:
    """`_prefill` of prompts with a common start, which runs once for each source.

    Args:
        policy: In eval mode.
        embeds: ``(B, N, D)``; sequences of one source are the same at their first ``shared``
            positions, which hold no padding.
        mask: ``(B, N)`` bool.
        shared: Positions.
        sources: B numbers.

    Returns:
        ``(B, D)``, and the cache of all N positions.
    """
    numbers = {source: n for n, source in enumerate(dict.fromkeys(sources))}
    first = [list(sources).index(source) for source in numbers]
    _, cache = _prefill(policy, embeds[first, :shared], mask[first, :shared])
    cache.batch_select_indices(
        torch.tensor([numbers[source] for source in sources], device=embeds.device)
    )
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, shared:]
    out = policy.decode(embeds[:, shared:], mask.long(), positions, cache)
    return out.last_hidden_state[:, -1], cache


def _start_first(embeds: Tensor, mask: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Padding on the left moves behind the first ``shared`` positions."""
    padding = (~mask).sum(1, keepdim=True)
    at = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    start = at < shared
    gap = (at >= shared) & (at < shared + padding)
    order = torch.where(start, at + padding, torch.where(gap, at - shared, at))
    return embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order)


def textless_tokens(policy: VideoLLaVASAMModel, device: torch.device | None = None) -> Tensor:
    """``(V,)`` bool: markers of images and masks, and rows of the vocabulary without a token."""
    banned = torch.zeros(policy.lm_head.weight.shape[0], dtype=torch.bool, device=device)
    banned[list(policy.special_token_ids.values())] = True
    banned[len(policy.tokenizer) :] = True
    return banned


def _first_tokens(policy: VideoLLaVASAMModel, stop_strings: tuple[str, ...]) -> list[int]:
    """Ids that begin an end."""
    ends = {policy.tokenizer.encode(stop, add_special_tokens=False)[0] for stop in stop_strings}
    return sorted(ends | ({policy.eos_token_id} - {None}))
