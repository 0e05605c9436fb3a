"""Keys and values of prompts, computed once for all that is generated behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from projects.llava_sam2_rl.models.decode_graph import DecodeGraphs
from projects.llava_sam2_rl.models.transformers_compat import PromptCache
from projects.llava_sam2_rl.utils.devices import indices_on


class GeneratingModel(Protocol):
    """What the sampler needs of a model, which is to be in eval mode.

    Dropout would make the log-probs of sampling differ from those of the pass with gradients.
    """

    @property
    def language_model(self) -> Any:
        """A causal language model of transformers, with adapters or not."""

    @property
    def decode_graphs(self) -> DecodeGraphs:
        """Whether steps of decoding are replayed from CUDA graphs."""

    @property
    def lm_head(self) -> Any:
        """Its head, a linear layer."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer, where there is one."""

    @property
    def special_token_ids(self) -> Mapping[str, int]:
        """Ids of the markers of images and masks."""

    @property
    def pad_token_id(self) -> int:
        """Id that stands behind the end of a sequence."""

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """Id or ids that end a sequence."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end a sequence; none where there is no tokenizer."""

    def forward_with_cache(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
    ) -> Any:
        """The language model without its head, behind what the cache holds."""


def prefill(
    policy: GeneratingModel,
    embeds: Tensor,
    mask: Tensor,
    shared: int = 0,
    sources: Sequence[int] | None = None,
) -> tuple[Tensor, PromptCache, Tensor]:
    """Reads prompts.

    Args:
        policy: In eval mode.
        embeds: ``(B, N, D)``, padded on the left.
        mask: ``(B, N)`` bool.
        shared: So many positions at the start of prompts of one source are the same, and are read
            once. Defaults to 0.
        sources: B numbers: the source of each prompt. Defaults to one each.

    Returns:
        Hidden state ``(B, D)`` at the last token of each prompt, the prompts' cache, and the mask
        ``(B, N)`` of the positions it holds.
    """
    if shared and sources is not None and len(set(sources)) < len(mask):
        embeds, mask = _start_first(embeds, mask, shared)
        return *_prefill_shared(policy, embeds, mask, shared, sources), mask
    return *_prefill(policy, embeds, mask), mask


def _prefill(policy: GeneratingModel, embeds: Tensor, mask: Tensor) -> tuple[Tensor, PromptCache]:
    """Hidden state ``(B, D)`` at the last token of each prompt, and the prompts' cache."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    cache = PromptCache()
    out = policy.forward_with_cache(embeds, mask.long(), positions, cache)
    return out.last_hidden_state[:, -1], cache


def _prefill_shared(
    policy: GeneratingModel, embeds: Tensor, mask: Tensor, shared: int, sources: Sequence[int]
) -> tuple[Tensor, PromptCache]:
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
    rows = indices_on(embeds.device, first)
    _, cache = _prefill(policy, embeds[rows, :shared], mask[rows, :shared])
    cache.select(indices_on(embeds.device, [numbers[source] for source in sources]))
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, shared:]
    out = policy.forward_with_cache(embeds[:, shared:], mask.long(), positions, cache)
    return out.last_hidden_state[:, -1], cache


def _start_first(embeds: Tensor, mask: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Padding on the left moves behind the first ``shared`` positions."""
    padding = (~mask).sum(1, keepdim=True)
    at = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    start = at < shared
    gap = (at >= shared) & (at < shared + padding)
    order = torch.where(start, at + padding, torch.where(gap, at - shared, at))
    return embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order)
