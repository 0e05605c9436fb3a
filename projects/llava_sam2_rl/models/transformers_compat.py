"""What differs between the versions of transformers: caches, attention by name, renamed things.

All else in models/ is written against what they have in common. Versions themselves are checked by
`utils.stack`; that masks and caches do what they should is tried by `models.sa2va.self_test`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class HeldCache(DynamicCache):
    """Base of caches that hold keys and values themselves.

    Where transformers' own caches keep them has changed (two lists until 4.53, an object a layer
    from 4.54 on), and so has what a model asks a cache for its masks. Here the answers come from
    one attribute, and the lists of the base class stay empty.
    """

    def __init__(self) -> None:
        super().__init__()
        #: Of each layer ``(N, K, S, d)``.
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.keys)

    def __bool__(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Positions that a layer holds."""
        layer = layer_idx or 0
        return self.keys[layer].shape[2] if layer < len(self.keys) else 0

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """How many positions new ones attend over, and at which the first of them is.

        Args:
            query: The number of new positions, or (4.53 to 4.57) the positions, ``(Q,)``.
            layer_idx: Which layer.
        """
        new = query if isinstance(query, int) else len(query)
        return self.get_seq_length(layer_idx) + new, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first new one (asked from 5.x on)."""
        return self.get_seq_length(layer_idx)


class PromptCache(HeldCache):
    """Keys and values that grow by being copied: for a few long passes."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Puts new positions ``(N, K, n, d)`` of a layer behind its others; returns all."""
        if layer_idx == len(self.keys):
            self.keys.append(key_states)
            self.values.append(value_states)
        else:
            self.keys[layer_idx] = torch.cat([self.keys[layer_idx], key_states], dim=2)
            self.values[layer_idx] = torch.cat([self.values[layer_idx], value_states], dim=2)
        return self.keys[layer_idx], self.values[layer_idx]

    def select(self, rows: Tensor) -> None:
        """Sequences by number, ``(M,)`` int64; one may come several times."""
        for layers in (self.keys, self.values):
            layers[:] = [x[rows] for x in layers]


def weights_left_unwritten() -> AbstractContextManager[None]:
    """Models that are built inside leave their matrices as they were handed out."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before 5.0
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()


def cache_argument(decoder: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of a decoder: it is called ``cache`` in late versions of 5.x.

    Args:
        decoder: A model of transformers without its head.
        cache: Of keys and values.
    """
    kind: Any = type(decoder)
    return {_cache_keyword(kind): cache}


@lru_cache(maxsize=8)
def _cache_keyword(kind: Any) -> str:
    parameters = inspect.signature(kind.forward).parameters
    return 'cache' if 'cache' in parameters else 'past_key_values'


def enable_checkpointing_of(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Turns activation checkpointing on; the method has another name in late versions of 5.x.

    Args:
        model: With adapters or not.
        options: Of `torch.utils.checkpoint.checkpoint`.
    """
    renamed = getattr(model, 'activation_checkpointing_enable', None)
    (renamed or model.gradient_checkpointing_enable)(options)


def register_attention(name: str, attention: Callable[..., Any]) -> None:
    """Makes an attention function known by a name, which gets the masks that ``'sdpa'`` gets.

    From 4.53 on a name without a mask function gets no mask at all, without an error.

    Args:
        name: For ``config._attn_implementation``.
        attention: As transformers' ``sdpa_attention_forward``.
    """
    register = getattr(ALL_ATTENTION_FUNCTIONS, 'register', None)
    if register is None:  # a plain dict, before 4.50
        ALL_ATTENTION_FUNCTIONS[name] = attention
    else:
        register(name, attention)
    masks = _mask_functions()
    if masks is not None:
        masks.register(name, masks['sdpa'])


def passes_block_masks() -> bool:
    """Whether models hand a `BlockMask` through to their attention as it is."""
    return _mask_functions() is not None


def _mask_functions() -> Any:
    """Transformers' mask functions by name; ``None`` before 4.53, where models make masks alone."""
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    except ImportError:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS
