"""Tries, before a model is used, that padding, trees and caches are masked as they should be.

A version of transformers that treats masks in another way need not fail: from 4.53 on an attention
function without a mask function got no mask at all, and log-probs were off by more than 1. So a
language model of the class in use, tiny and random, reads two sequences together and each alone, by
the functions of training and sampling. What comes out must be the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache

from projects.llava_sam2_rl.models.decode_graph import DecodeGraphs
from projects.llava_sam2_rl.models.generation import Sampling, no_gradient, sample_completions
from projects.llava_sam2_rl.models.prefix_tree import PrefixTree, TreeMask
from projects.llava_sam2_rl.models.sa2va import language
from projects.llava_sam2_rl.models.sa2va.building import parts_of
from projects.llava_sam2_rl.models.sa2va.internvl import build_language_model
from projects.llava_sam2_rl.utils.errors import StackError

#: Rounding gives some 1e-6, a missing mask more than 0.1.
TOLERANCE = 1e-2

_SIZES = {
    'vocab_size': 24,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'pad_token_id': 0,
}


@lru_cache(maxsize=8)
def check_language_model(architecture: str) -> None:
    """Tries a class of language models, once a process; takes about a tenth of a second.

    On the CPU in float32. No random state is changed.

    Args:
        architecture: Name in ``llm_config.architectures``.

    Raises:
        StackError: A path gives another result for sequences together than for each alone.
    """
    with (
        torch.random.fork_rng(devices=[]),
        torch.device('cpu'),
        torch.autocast('cpu', enabled=False),
        parts_of(torch.float32),
        no_gradient(),
    ):
        differences = measure(_TinyModel(architecture))
    for path, difference in differences.items():
        if not difference <= TOLERANCE:  # so that nan is caught
            raise StackError(
                f'{architecture} of transformers {transformers.__version__} gives wrong results: '
                f'{path} differs by {difference:.3g} from each sequence alone (at most '
                f'{TOLERANCE:g}): install a tested version, see docs/stacks.md'
            )


def measure(model: _TinyModel) -> dict[str, float]:
    """The greatest difference to each sequence alone, by path.

    Args:
        model: On the CPU; what `HasHiddenStates` and `GeneratingModel` ask for.
    """
    # Seven and four tokens; the first two are the same.
    pair = [torch.tensor([3, 4, 5, 6, 7, 8, 9]), torch.tensor([3, 4, 10, 11])]
    embeds = [model.embed(ids) for ids in pair]
    alone = [model.alone(x) for x in embeds]
    found = {}
    for side in ('right', 'left'):
        hidden = model.hidden_states(*_padded(embeds, side))
        rows = zip(hidden, _padded(embeds, side)[1], alone, strict=True)
        found[f'padding on the {side}'] = max(_gap(row[real], x) for row, real, x in rows)
    found['the tree of sequences with a common start'] = _tree_gap(model, embeds, alone)
    found['sampling behind a cache, token by token'] = _sampling_gap(model, embeds)
    return found


def _tree_gap(model: _TinyModel, embeds: list[Tensor], alone: list[Tensor]) -> float:
    tree = PrefixTree()
    start = tree.add_node(embeds[0][:2])
    for x in embeds:
        tree.add_node(x[2:], start)
    first, *branches = tree.forward(model)
    # The start knows nothing of what follows it, in the tree as in the sequence.
    gaps = [_gap(first, model.alone(embeds[0][:2]))]
    gaps += [_gap(first, x[:2]) for x in alone]
    gaps += [_gap(branch, x[2:]) for branch, x in zip(branches, alone, strict=True)]
    return max(gaps)


def _sampling_gap(model: _TinyModel, embeds: list[Tensor]) -> float:
    """Of the log-probs of sampling to those of one pass over prompt and completion."""
    # As many as it takes for weights to be merged for the rollout (`decode_layers`).
    options = Sampling(max_new_tokens=16, greedy=True, stop_strings=(), eos_token_id=())
    drawn = sample_completions(model, *_padded(embeds, 'left'), 2, options)
    gaps = []
    for n, (ids, logps) in enumerate(zip(drawn.completion_ids, drawn.per_token_logps, strict=True)):
        prompt = embeds[n // 2]
        hidden = model.alone(torch.cat([prompt, model.embed(ids[:-1])]))[len(prompt) - 1 :]
        expected = model.lm_head(hidden).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        gaps.append(_gap(logps, expected))
    return max(gaps)


def _padded(embeds: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """``(B, N, D)``, padded with what is no zero, and its mask ``(B, N)`` bool."""
    length = max(map(len, embeds))
    padded = torch.ones(len(embeds), length, embeds[0].shape[1])
    mask = torch.zeros(len(embeds), length, dtype=torch.bool)
    for row, (x, real) in enumerate(zip(embeds, mask, strict=True)):
        span = slice(len(x)) if side == 'right' else slice(length - len(x), length)
        padded[row, span] = x
        real[span] = True
    return padded, mask


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


class _TinyModel:
    """A language model as `HasHiddenStates` and `GeneratingModel` ask for it, without a tokenizer.

    Its weights are greater than those that transformers draw, so that what is attended to counts.
    """

    tokenizer = None
    special_token_ids: Mapping[str, int] = {}
    pad_token_id = 0
    eos_token_id = None
    stop_strings: tuple[str, ...] = ()
    decode_graphs = DecodeGraphs('off')

    def __init__(self, architecture: str) -> None:
        self.language_model = build_language_model({**_SIZES, 'architectures': [architecture]})
        self.language_model.eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in self.language_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4, generator=generator)

    @property
    def lm_head(self) -> Any:
        return self.language_model.get_output_embeddings()

    def embed(self, ids: Tensor) -> Tensor:
        return self.language_model.get_input_embeddings()(ids)

    def alone(self, embeds: Tensor) -> Tensor:
        """``(N, D)`` hidden states of ``(N, D)`` embeddings: a batch of one, nothing masked."""
        mask = torch.ones(1, len(embeds), dtype=torch.bool)
        return self.hidden_states(embeds[None], mask)[0]

    def hidden_states(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | TreeMask,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if isinstance(attention_mask, TreeMask):
            attention_mask = attention_mask.dense()
        return language.hidden_states(
            self.language_model, inputs_embeds, attention_mask, position_ids
        )

    def forward_with_cache(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
    ) -> Any:
        return language.forward_with_cache(
            self.language_model, inputs_embeds, attention_mask, position_ids, past_key_values
        )
