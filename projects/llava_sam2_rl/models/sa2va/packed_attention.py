"""Attention of the packed passes, whose masks are trees: by nodes, FlexAttention or a dense mask.

A dense mask keeps PyTorch's scaled dot-product attention from its fastest kernels, and makes it
compute what nobody sees: three quarters of all, where eight completions of 128 tokens stand behind
a prompt of 350. On a CPU each node attends to its branch for itself, unless rows are so short that
the calls cost more; on a GPU they would be too many. There FlexAttention (Dong et al. 2024, "Flex
Attention: A Programming Model for Generating Optimized Attention Kernels") leaves out the blocks of
a row in which no token sees another, such as those of two branches. It is compiled for the GPU, so
whether it works is tried before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from projects.llava_sam2_rl.models.group_cache import folded_attention
from projects.llava_sam2_rl.models.prefix_tree import GPU_BLOCK, NodeInRow, TreeMask
from projects.llava_sam2_rl.models.transformers_compat import (
    passes_block_masks,
    register_attention,
)

CHOICES = ('auto', 'sdpa', 'flex')
#: Name of the attention that takes all kinds of masks.
_NAME = 'sdpa_or_flex'
#: Attribute of a dense mask: its `RowsOfNodes`. Where it is lost the mask itself is left.
_ROWS = 'rows_of_nodes'
#: Scores nobody sees, times the model's width, that are worth the calls of a node. Between those
#: of the tiny model, whose steps take 0.05 to 0.17 longer by nodes, and those of the 100 M model,
#: 30 to 100 times as many, whose steps take a sixth less.
_SCORES_OF_A_CALL = 10**6
#: Earlier GPUs have no bfloat16 and no kernel worth having.
_LEAST_CAPABILITY = (8, 0)
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: by a `BlockMask`, by nodes, or as ``'sdpa'`` does.

    Args:
        module: The attention layer.
        query: ``(B, H, N, d)``.
        key: ``(B, K, S, d)``; H is a multiple of K.
        value: Likewise.
        attention_mask: A block mask; or what ``'sdpa'`` gets.
        dropout: Of the dense kind.
        scaling: Of the scores.
        **options: Of the dense kind.

    Returns:
        ``(B, N, H, d)`` and no weights.
    """
    rows = getattr(attention_mask, _ROWS, None)
    if rows is not None and not dropout:
        return _by_nodes(module, query, key, value, rows, scaling), None
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    # Autocast knows nothing of it, and rotary embeddings have made float32 of two of them.
    dtype = value.dtype
    out = _flex(query.device.type)(
        query.to(dtype),
        key.to(dtype),
        value,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


register_attention(_NAME, attend)


class RowsOfNodes:
    """The rows of a `TreeMask`, and masks of branches, which all layers share.

    Args:
        nodes: Of each row, in their order.
    """

    def __init__(self, nodes: Sequence[Sequence[NodeInRow]]) -> None:
        self.nodes = nodes
        self._masks: dict[tuple[int, int, int, torch.dtype], Tensor] = {}

    def mask(self, length: int, times: int, keys: Tensor) -> Tensor:
        """``(times·length, S)``, added to the scores of a node behind others.

        Args:
            length: Of the node, whose places see those before them.
            times: How often the node's places stand one behind the other.
            keys: ``(1, K, S, d)`` of its branch, the node last.
        """
        width, kind = keys.shape[2], keys.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else keys.dtype
        size = (length, width, times, dtype)
        if size not in self._masks:
            lowest = torch.finfo(dtype).min
            mask = torch.full((length, width), lowest, dtype=dtype, device=keys.device)
            self._masks[size] = mask.triu(width - length + 1).repeat(times, 1)
        return self._masks[size]


def _by_nodes(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: RowsOfNodes,
    scaling: float | None,
) -> Tensor:
    """Attention of each node to its branch, ``(B, N, H, d)``; 0 for padding, which nobody reads."""
    share = query.shape[1] // key.shape[1]
    found = []
    for n, row in enumerate(rows.nodes):
        lengths = [node.length for node in row]
        lengths.append(query.shape[2] - sum(lengths))  # padding
        # Split at once: its gradient is one tensor, that of so many slices one each.
        q, k, v = (x[n : n + 1].split(lengths, dim=2) for x in (query, key, value))
        parts = []
        for i, node in enumerate(row):
            if not node.before:
                keys, values = (x[i].repeat_interleave(share, dim=1) for x in (k, v))
                out = F.scaled_dot_product_attention(
                    q[i], keys, values, is_causal=True, scale=scaling
                )
                parts.append(out.transpose(1, 2))
                continue
            # What backward keeps of each branch has the heads of keys, not those of queries.
            branch = [*node.before, i]
            keys, values = (torch.cat([x[j] for j in branch], dim=2) for x in (k, v))
            mask = rows.mask(node.length, share, keys)
            parts.append(folded_attention(module, q[i], keys, values, mask, scaling=scaling)[0])
        parts.append(torch.zeros_like(q[-1], dtype=parts[0].dtype).transpose(1, 2))
        found.append(torch.cat(parts, dim=1))
    return torch.cat(found)


class PackedAttention:
    """How packed passes attend, decided at the first one and logged.

    Args:
        choice: ``'sdpa'``: by a dense mask. ``'flex'``: by FlexAttention. ``'auto'``: by the latter
            on a GPU, by nodes on a CPU where rows are long enough. Where FlexAttention does not
            work it is a dense mask, and a line of log says why.

    Raises:
        ValueError: ``choice`` is unknown.
    """

    def __init__(self, choice: str) -> None:
        if choice not in CHOICES:
            raise ValueError(f'attention must be one of {", ".join(CHOICES)}, got {choice!r}')
        self.choice = choice
        #: What was decided; ``None`` before the first pass.
        self.used: str | None = None

    def mask(self, language_model: PreTrainedModel, tree: TreeMask, embeds: Tensor) -> Any:
        """The tree as the language model takes it: ``(B, N, N)`` bool or a block mask."""
        if self.used is None:
            self._decide(language_model, embeds)
        if self.used == 'flex':
            return block_mask(tree)
        dense = tree.dense()
        if self.used == 'nodes' and nodes_pay(tree, embeds.shape[-1]):
            setattr(dense, _ROWS, RowsOfNodes(tree.rows))
        return dense

    def _decide(self, language_model: PreTrainedModel, embeds: Tensor) -> None:
        self.used = 'sdpa'
        config: Any = language_model.config
        if self.choice == 'auto' and embeds.device.type == 'cpu':
            self.used, config._attn_implementation = 'nodes', _NAME
            return
        if self.choice == 'sdpa' or (self.choice == 'auto' and embeds.device.type != 'cuda'):
            return
        kind, dtype = embeds.device.type, embeds.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        problem = _problem(config, embeds.device, dtype)
        if problem is None:
            self.used = 'flex'
            config._attn_implementation = _NAME
            print_log('Packed passes attend by FlexAttention', logger='current')
        else:
            print_log(
                f'Packed passes attend by a dense mask, FlexAttention is left out: {problem}',
                logger='current',
            )


def nodes_pay(tree: TreeMask, width: int) -> bool:
    """Whether the scores that nobody sees cost a CPU more than attention node by node does.

    Args:
        tree: The rows.
        width: Of the model.
    """
    needed = sum(
        node.length * (node.length + sum(row[n].length for n in node.before))
        for row in tree.rows
        for node in row
    )
    unseen = tree.nodes.shape[0] * tree.nodes.shape[1] ** 2 - needed
    return unseen * width >= _SCORES_OF_A_CALL * sum(map(len, tree.rows)) > 0


def added_to_scores(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, 1, Q, S)``: 0 where seen ``(B, Q, S)``, else the lowest number."""
    mask = (~seen[:, None]).to(dtype).mul_(torch.finfo(dtype).min)
    setattr(mask, _ROWS, getattr(seen, _ROWS, None))
    return mask


def block_mask(tree: TreeMask) -> BlockMask:
    """The blocks of B rows in which some place sees another."""
    rows, width = tree.nodes.shape

    def allows(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return tree.allows(row, query, key)

    device = tree.nodes.device
    return create_block_mask(
        allows, rows, None, width, width, device=str(device), BLOCK_SIZE=GPU_BLOCK
    )


@lru_cache(maxsize=2)
def _flex(device: str) -> Any:
    """Compiled for a GPU. Elsewhere as it is: slow, and without a way back on a CPU."""
    return torch.compile(flex_attention, dynamic=True) if device == 'cuda' else flex_attention


def _problem(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlexAttention cannot be used; ``None`` where it can."""
    if not passes_block_masks():
        return 'transformers from 4.53 on hands its masks through'
    if getattr(config, 'attention_dropout', 0.0):
        return f'the model has attention_dropout={config.attention_dropout}'
    if device.type == 'cuda':
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            least = '.'.join(map(str, _LEAST_CAPABILITY))
            return f'a GPU of compute capability {least} is needed, this one has {capability}'
    try:
        # Of two widths: what is compiled for one has to do for others.
        difference = max(_try(config, device, dtype, blocks) for blocks in (2, 5))
    except Exception as error:  # a compiler's, of any kind: the dense mask needs none
        return f'{type(error).__name__}: {error}'.splitlines()[0][:200]
    if not difference < _TOLERANCE[dtype]:
        return f'its results are {difference:.2g} from those of the dense mask'
    return None


def _try(config: Any, device: torch.device, dtype: torch.dtype, blocks: int) -> float:
    """The largest difference between both kinds, of results and gradients, at the model's heads."""
    heads = config.num_attention_heads
    groups = getattr(config, 'num_key_value_heads', None) or heads
    width = getattr(config, 'head_dim', None) or config.hidden_size // heads
    length = blocks * GPU_BLOCK
    draw = torch.Generator().manual_seed(0)
    sizes = (heads, groups, groups)
    given = [
        torch.randn(1, n, length, width, generator=draw).to(device, dtype).requires_grad_()
        for n in sizes
    ]
    # Two branches behind a common part.
    nodes = (torch.arange(length, device=device) // (length // 4)).clamp(max=2)[None]
    sees = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool, device=device)
    tree = TreeMask(sees, nodes, torch.arange(length, device=device)[None])
    with torch.enable_grad():
        query, key, value = given
        ours, _ = attend(None, query, key, value, block_mask(tree))
        key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
        mask = tree.dense()[:, None]
        theirs = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
        found = [
            [out, *torch.autograd.grad(out.float().square().sum(), given)] for out in (ours, theirs)
        ]
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(*found, strict=True)
    )
