"""InternLM2 (Cai et al. 2024, arXiv:2403.17297) as transformers' Llama.

The two are the same network under two sets of names, but for one thing: InternLM2 keeps the
projections to queries, keys and values in one matrix ``wqkv``, group after group of heads. For each
of K key heads its rows are those of the H / K query heads that share it, then its own, then those
of its value head; d rows a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

FUSED = 'wqkv'
#: What ``wqkv`` is split into.
SPLIT = ('q_proj', 'k_proj', 'v_proj')
# Parts of names, InternLM2's -> Llama's.
_LLAMA = {
    'output': 'lm_head',
    'tok_embeddings': 'embed_tokens',
    'attention': 'self_attn',
    'feed_forward': 'mlp',
    'attention_norm': 'input_layernorm',
    'ffn_norm': 'post_attention_layernorm',
    'wo': 'o_proj',
    'w1': 'gate_proj',
    'w2': 'down_proj',
    'w3': 'up_proj',
}
_INTERNLM2 = {llama: internlm2 for internlm2, llama in _LLAMA.items()}
# What is called the same in both configs; defaults are InternLM2's.
_SIZES: dict[str, Any] = {
    'vocab_size': 103168,
    'hidden_size': 4096,
    'intermediate_size': 11008,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': None,
    'hidden_act': 'silu',
    'max_position_embeddings': 2048,
    'initializer_range': 0.02,
    'rms_norm_eps': 1e-6,
    'pad_token_id': 0,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'tie_word_embeddings': False,
}


def internlm2_config(
    bias: bool = True,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    **values: Any,
) -> LlamaConfig:
    """Llama's config of the same network.

    Args:
        bias: Whether the four projections of attention layers have one.
        rope_theta: Base of the rotary embeddings.
        rope_scaling: ``type``, ``'linear'`` or ``'dynamic'``, and ``factor``; ``None`` for none.
        **values: The rest of an ``llm_config``; sizes are taken, all else is for other readers.

    Raises:
        ValueError: ``rope_scaling`` is of another kind.
    """
    if rope_scaling is not None:
        kind = rope_scaling.get('type', rope_scaling.get('rope_type'))
        factor = rope_scaling.get('factor')
        if kind not in ('linear', 'dynamic') or not isinstance(factor, int | float) or factor < 1:
            raise ValueError(
                "llm_config.rope_scaling of InternLM2 must have type 'linear' or 'dynamic' and a "
                f'factor of 1 or more, got {dict(rope_scaling)}'
            )
        rope_scaling = {'rope_type': kind, 'factor': float(factor)}
    return LlamaConfig(
        **{key: values.get(key, default) for key, default in _SIZES.items()},
        attention_bias=bias,
        rope_theta=float(rope_theta),
        rope_scaling=rope_scaling,
    )


def llama_names(name: str) -> tuple[str, ...]:
    """Llama's name for a module or tensor of InternLM2; three names where it is of ``wqkv``.

    Args:
        name: A dotted name or its end (``'wo'``); peft's additions may be in it. Parts that are
            not InternLM2's stay as they are.
    """
    parts = [_LLAMA.get(part, part) for part in name.split('.')]
    if FUSED not in parts:
        return ('.'.join(parts),)
    return tuple('.'.join(one if part == FUSED else part for part in parts) for one in SPLIT)


def internlm2_name(name: str) -> tuple[str, str | None]:
    """InternLM2's name for a tensor of Llama, and which of `SPLIT` it is, where it is one."""
    parts = name.split('.')
    which = next((part for part in parts if part in SPLIT), None)
    renamed = (FUSED if part in SPLIT else _INTERNLM2.get(part, part) for part in parts)
    return '.'.join(renamed), which


def is_internlm2_name(name: str) -> bool:
    """Whether a name has a part that only InternLM2 has."""
    return llama_names(name) != (name,)


def fused_rows(config: PretrainedConfig) -> dict[str, Tensor]:
    """Which rows of ``wqkv`` are those of each of `SPLIT`, in order: int64.

    Args:
        config: Llama's.
    """
    groups = config.num_key_value_heads
    width = config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // groups
    rows = torch.arange(groups * (shared + 2) * width).view(groups, shared + 2, width)
    parts = (rows[:, :shared], rows[:, shared], rows[:, shared + 1])
    return {name: part.flatten() for name, part in zip(SPLIT, parts, strict=True)}


def split(name: str, tensor: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tensor of InternLM2 under Llama's names.

    The three parts of a LoRA layer over ``wqkv`` share its A and divide B's rows: B A x has in the
    rows of a part what B's rows there make of A x. So the split adapter adds exactly what the fused
    one did.

    Args:
        name: InternLM2's, peft's additions included.
        tensor: Its value.
        rows: Of `fused_rows`.

    Raises:
        ValueError: The tensor has another number of rows than ``wqkv``.
    """
    names = llama_names(name)
    if len(names) == 1:
        return {names[0]: tensor}
    if '.lora_A.' in name:
        return {one: tensor.clone() for one in names}
    expected = sum(len(part) for part in rows.values())
    if len(tensor) != expected:
        raise ValueError(f'{name} has {len(tensor)} rows, the model {expected}')
    return {one: tensor[rows[part]] for one, part in zip(names, SPLIT, strict=True)}
