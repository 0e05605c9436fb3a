"""The sampler: training, validation, evaluation and inference generate text with it.

A prompt's keys and values are computed once and read by the G completions of its group where they
lie. Sequences that have ended leave the batch. The pass with gradients over what was sampled is in
`shared_prefix`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from projects.llava_sam2_rl.engine.timing import phase
from projects.llava_sam2_rl.models.decode_layers import fast_layers
from projects.llava_sam2_rl.models.decoding import SequenceEnds, StopWatcher, direct_linears
from projects.llava_sam2_rl.models.group_cache import ActiveSequences
from projects.llava_sam2_rl.models.prefill import GeneratingModel, prefill
from projects.llava_sam2_rl.prompts import clean_caption, encode_text, truncate_at_stop
from projects.llava_sam2_rl.utils.devices import indices_on, to_device

#: Below this share of a batch the sequences that go on are gathered into a smaller one.
_COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: Maximum length of a completion in tokens. Defaults to 128.
        temperature: Sampling temperature, > 0: the logits are divided by it. Defaults to 1.0.
        top_p: Probability mass of the most likely tokens that a draw keeps, in (0, 1]; 1 keeps
            all. Defaults to 1.0.
        top_k: Number of most likely tokens that a draw keeps; 0 keeps all. Defaults to 0.
        stop_strings: Texts that end a completion, each by itself; ``None`` takes those of the
            model's chat template. Defaults to None.
        greedy: Take the most likely token instead of drawing one. Defaults to False.
        min_new_tokens: Number of tokens before which no end and no stop text may begin. Defaults
            to 0.
        eos_token_id: Id or ids that end a completion; ``None`` takes the model's. Defaults to
            None.
        suppress_tokens: Ids that are never generated, beside those without text (rows of the
            vocabulary that are padding); ``None`` takes the markers of images and masks. Defaults
            to None.

    Raises:
        ValueError: A number is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: tuple[str, ...] | None = None
    greedy: bool = False
    min_new_tokens: int = 0
    eos_token_id: int | Sequence[int] | None = None
    suppress_tokens: tuple[int, ...] | None = None

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

    def eos_token_ids(self, policy: GeneratingModel) -> tuple[int, ...]:
        """Ids that end a completion of ``policy``."""
        ids = policy.eos_token_id if self.eos_token_id is None else self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    def stops(self, policy: GeneratingModel) -> tuple[str, ...]:
        """Texts that end a completion of ``policy``."""
        return policy.stop_strings if self.stop_strings is None else self.stop_strings


@dataclass(frozen=True, eq=False)
class Completions:
    """N = B*G sampled completions, the G of a prompt side by side."""

    #: ``(N, T)`` int64, padded behind each end.
    completion_ids: Tensor
    #: ``(N, T)`` bool, through the token that completes the first stop.
    completion_mask: Tensor
    #: ``(N, T)`` float32: log-probs under the temperature-scaled softmax, before any top-k or
    #: top-p cut; 0 outside the mask.
    per_token_logps: Tensor
    #: N captions, cleaned of markers; empty texts where the model has no tokenizer.
    texts: list[str]
    #: ``(N,)`` bool: the length limit ended it.
    truncated: Tensor


def get_token_logprobs(generate_output: Any, temperature: float = 1.0) -> Tensor:
    """Log-probs of the tokens that transformers' ``generate`` produced.

    Args:
        generate_output: Of ``generate(..., return_dict_in_generate=True)`` with
            ``output_logits=True`` (raw logits, which are divided by ``temperature`` here) or
            ``output_scores=True`` (already scaled by it, and cut by top-k and top-p where used).
        temperature: The temperature of the sampling; applied to raw logits only. Defaults to 1.0.

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
    policy: GeneratingModel,
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

    Args:
        policy: In eval mode.
        prompt_embeds: ``(B, N, D)``, padded on the left.
        prompt_mask: ``(B, N)`` bool.
        num_generations: G.
        sampling: How.
        generator: Source of randomness. Defaults to torch's.
        shared: So many positions at the start of prompts of one source are the same (its image),
            and are computed once. Defaults to 0.
        sources: B numbers: the source of each prompt. Defaults to one each.

    Raises:
        ValueError: There are stop strings and the model has no tokenizer.
    """
    if sampling.stops(policy) and policy.tokenizer is None:
        raise ValueError('stop_strings are found in decoded text: give the model a tokenizer')
    with phase('prefill'):
        last, prompts, mask = prefill(policy, prompt_embeds, prompt_mask, shared, sources)
    active = ActiveSequences(policy, last, prompts, mask, num_generations, sampling.max_new_tokens)
    del prompts  # the active sequences have their own copy
    ids, logps, ended = _decode(policy, active, sampling, generator)
    texts, mask = _texts_and_mask(policy, ids, sampling)
    return Completions(
        completion_ids=ids,
        completion_mask=mask,
        per_token_logps=logps.masked_fill(~mask, 0.0),
        texts=texts,
        truncated=~ended,
    )


class _TokenChooser:
    """Draws the next token of each sequence, or takes the most likely one."""

    def __init__(
        self,
        policy: GeneratingModel,
        sampling: Sampling,
        generator: torch.Generator | None,
        device: torch.device,
    ) -> None:
        self.sampling, self.generator = sampling, generator
        self.suppressed = suppressed_token_mask(policy, device, sampling.suppress_tokens)
        self.warpers = sampling.warpers()
        ends = stop_start_ids(policy, sampling.stops(policy), sampling.eos_token_ids(policy))
        self.or_end = self.suppressed.clone()
        self.or_end[indices_on(device, ends)] = True

        # The warpers ask for what was drawn and do not look at it.
        self.unread = torch.empty(0, dtype=torch.int64, device=device)

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """``(R,)`` int64, of logits ``(R, V)`` over the temperature; ``step`` tokens were drawn."""
        suppressed = self.or_end if step < self.sampling.min_new_tokens else self.suppressed
        allowed = logits.masked_fill(suppressed, float('-inf'))
        if self.sampling.greedy:
            return allowed.argmax(-1)
        probs = self.warpers(self.unread, allowed).softmax(-1)
        if probs.device.type == 'cpu':
            # A number a row instead of one a token, each of which takes a CPU 20 ns.
            sums = probs.cumsum(-1, dtype=torch.float64)
            drawn = torch.rand(len(sums), 1, dtype=torch.float64, generator=self.generator)
            # The first token whose sum is above; the last that adds to it where rounding has none.
            found = torch.searchsorted(sums, drawn * sums[:, -1:], right=True)
            last = torch.searchsorted(sums, sums[:, -1:].contiguous())
            return found.minimum(last).squeeze(1)
        # The Gumbel-max trick in probabilities; `torch.multinomial` computes the same and, on a
        # GPU, has the host wait to check its arguments.
        noise = torch.empty_like(probs).exponential_(generator=self.generator)
        return (probs / noise).argmax(-1)


def _decode(
    policy: GeneratingModel,
    active: ActiveSequences,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token until all sequences have ended.

    Returns:
        Ids ``(N, T)``, their log-probs ``(N, T)``, and which have ended ``(N,)``.
    """
    count, limit, device = len(active.sequences), sampling.max_new_tokens, active.hidden.device
    choose = _TokenChooser(policy, sampling, generator, device)
    watcher = StopWatcher(policy.tokenizer, sampling.stops(policy), sampling.eos_token_ids(policy))
    ends = SequenceEnds(watcher, count)
    look_every = tokens_between_looks(device)
    ids = torch.full((count, limit), policy.pad_token_id, device=device)
    logps = torch.zeros(count, limit, device=device)
    steps = 0
    with (
        phase('decode'),
        fast_layers(policy.language_model, count, limit) as complete,
        direct_linears(policy.language_model),
    ):
        for step in range(limit):
            logits = policy.lm_head(active.hidden).float() / sampling.temperature
            tokens = choose(logits, step)
            chosen = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)
            ids[active.index, step] = tokens
            logps[active.index, step] = chosen
            steps = step + 1
            if steps % look_every == 0 or steps == limit:
                going = ends.look(ids[:, :steps], active.index, active.sequences)
                if not going or steps == limit:
                    break
                places = active.places(going)
                if len(places) < _COMPACT_BELOW * len(active.sequences):
                    tokens = tokens[active.keep(places)]
            active.advance(policy, tokens, autocast=not complete)
    # What was drawn behind an end before the host looked is thrown away.
    lengths = [steps if length is None else length for length in ends.lengths]
    longest = max(lengths)
    behind = torch.arange(longest, device=device) >= indices_on(device, lengths)[:, None]
    return (
        ids[:, :longest].masked_fill(behind, policy.pad_token_id),
        logps[:, :longest].masked_fill(behind, 0.0),
        to_device(torch.tensor([length is not None for length in ends.lengths]), device),
    )


def tokens_between_looks(device: torch.device) -> int:
    """After how many tokens the host looks at what was drawn; a GPU it would keep waiting."""
    return 1 if device.type == 'cpu' else 8


def _texts_and_mask(
    policy: GeneratingModel, ids: Tensor, sampling: Sampling
) -> tuple[list[str], Tensor]:
    """N captions, and ``(N, T)`` bool through each end."""
    eos_ids = sampling.eos_token_ids(policy)
    if policy.tokenizer is None:
        is_end = torch.isin(ids, torch.tensor(eos_ids, dtype=ids.dtype, device=ids.device)).long()
        return [''] * len(ids), is_end.cumsum(1) - is_end == 0
    texts, mask = truncate_at_stop(ids, policy.tokenizer, sampling.stops(policy), eos_ids)
    return [clean_caption(text) for text in texts], mask


def suppressed_token_mask(
    policy: GeneratingModel,
    device: torch.device | None = None,
    suppress_tokens: Sequence[int] | None = None,
) -> Tensor:
    """``(V,)`` bool: what is never generated; see `Sampling.suppress_tokens`."""
    suppressed = torch.zeros(policy.lm_head.weight.shape[0], dtype=torch.bool)
    if suppress_tokens is None:
        suppress_tokens = list(policy.special_token_ids.values())
    suppressed[list(suppress_tokens)] = True
    if policy.tokenizer is not None:
        # Embeddings are often padded beyond the vocabulary; such ids have no text.
        suppressed[len(policy.tokenizer) :] = True
    return suppressed if device is None else to_device(suppressed, device)


def stop_start_ids(
    policy: GeneratingModel, stop_strings: Sequence[str], eos_token_ids: Sequence[int]
) -> list[int]:
    """Ids that begin an end of a completion: the first of each stop text, and the ends proper."""
    starts = set(eos_token_ids)
    if policy.tokenizer is not None:
        starts |= {encode_text(policy.tokenizer, stop)[0] for stop in stop_strings}
    return sorted(starts)
