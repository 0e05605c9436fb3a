"""Many sequences that begin alike in one forward pass, every common part computed once.

What is asked of an image starts with the image: its 256 tokens or more stand before every prompt
about it, before the G completions of a region as before the G descriptions of a return trip. Such
sequences form a tree. Its nodes are laid one behind the other in a row, with positions counted
along each branch, and a mask lets a token see its own branch only (tree attention, Miao et al.
2023, "SpecInfer"). It is one ordinary pass without a cache: gradients flow to the common parts from
all branches, and activation checkpointing works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from projects.llava_sam2_rl.utils.devices import to_device

#: Rows end here where they can: attention grows with the square of a row. Another row computes the
#: common part again.
MAX_ROW = 2048
#: On a GPU rows are as wide as a multiple of this: kernels of attention work on blocks.
GPU_BLOCK = 128


@dataclass(frozen=True)
class NodeInRow:
    """A node where it stands in a row.

    Args:
        length: Its places; they follow those of the node before it in the row.
        before: The nodes of its branch from the root on, without itself, by their place among the
            nodes of the row.
    """

    length: int
    before: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TreeMask:
    """Who sees whom in rows of nodes: a token its own branch up to itself.

    Args:
        sees: ``(M, M)`` bool: the nodes (second axis) that are in a node's branch.
        nodes: ``(B, N)`` int64: the node of each place.
        positions: ``(B, N)`` int64: its position in its branch.
        rows: B rows of nodes in their order, padding left out; none where it is not known.
    """

    sees: Tensor
    nodes: Tensor
    positions: Tensor
    rows: tuple[tuple[NodeInRow, ...], ...] = ()

    def allows(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the place ``query`` of a row sees ``key``; all int64, broadcast."""
        seen = self.sees[self.nodes[row, query], self.nodes[row, key]]
        seen = seen & (self.positions[row, key] <= self.positions[row, query])
        return seen | (query == key)

    def dense(self) -> Tensor:
        """``(B, N, N)`` bool of all places (the second axis) and what they see."""
        rows, width = self.nodes.shape
        row, place = (torch.arange(n, device=self.nodes.device) for n in (rows, width))
        return self.allows(row[:, None, None], place[None, :, None], place[None, None, :])


class HasHiddenStates(Protocol):
    """A language model without its head, as `VideoLLaVASAMModel` has it."""

    def hidden_states(
        self, inputs_embeds: Tensor, attention_mask: TreeMask, position_ids: Tensor, /
    ) -> Tensor:
        """``(B, N, D)`` of embeddings, a mask of B rows of N places and positions ``(B, N)``."""


class PrefixTree:
    """Trees of nodes, each a part of a sequence; a sequence is a way from a root to a leaf."""

    def __init__(self) -> None:
        self._embeds: list[Tensor] = []
        self._parents: list[int | None] = []

    def add_node(self, embeds: Tensor, parent: int | None = None) -> int:
        """Adds a node behind another one, or the root of a new tree.

        Args:
            embeds: ``(L, D)``, L >= 1.
            parent: What `add_node` returned for the node that comes before.

        Returns:
            The node's number.

        Raises:
            ValueError: The node is empty.
        """
        if not len(embeds):
            raise ValueError('a node needs a token at least')
        self._embeds.append(embeds)
        self._parents.append(parent)
        return len(self._embeds) - 1

    def forward(self, policy: HasHiddenStates) -> list[Tensor]:
        """``(L, D)`` hidden states of every node, without the head."""
        device = self._embeds[0].device
        lengths = [len(x) for x in self._embeds]
        rows = self._rows(lengths)
        paths = [self._path(node) for node in range(len(lengths))]
        block = GPU_BLOCK if device.type == 'cuda' else 1
        source, nodes, positions, places = _layout(lengths, rows, paths, block)
        # The last entry is the padding's, which sees and is seen by itself alone.
        sees = torch.zeros(len(lengths) + 1, len(lengths) + 1, dtype=torch.bool)
        for node, path in enumerate(paths):
            sees[node, path] = True
        source, nodes, positions, sees = (
            to_device(x, device) for x in (source, nodes, positions, sees)
        )
        mask = TreeMask(sees, nodes, positions, _in_rows(lengths, rows, paths))
        hidden = policy.hidden_states(torch.cat(self._embeds)[source], mask, positions)
        return [hidden[r, at : at + n] for (r, at), n in zip(places, lengths, strict=True)]

    def _path(self, node: int) -> list[int]:
        """From the root to the node."""
        path = [node]
        while (parent := self._parents[path[0]]) is not None:
            path.insert(0, parent)
        return path

    def _rows(self, lengths: list[int]) -> list[list[int]]:
        """The nodes of each row; a common part stands wherever some of its branches do."""
        trees: dict[int, list[list[int]]] = {}
        inner = set(self._parents)
        for leaf in range(len(lengths)):
            if leaf in inner:
                continue
            path = self._path(leaf)
            rows = trees.setdefault(path[0], [[]])
            new = [node for node in path if node not in rows[-1]]
            if rows[-1] and sum(lengths[node] for node in rows[-1] + new) > MAX_ROW:
                rows.append([])
                new = path
            rows[-1] += new
        return _share_rows([row for rows in trees.values() for row in rows], lengths)


def _share_rows(rows: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Puts short rows behind others: the longest one says how wide the batch is anyway."""
    sizes = {id(row): sum(lengths[node] for node in row) for row in rows}
    width = max(sizes.values())
    merged: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -sizes[id(row)]):
        size = sizes[id(row)]
        for n, other in enumerate(merged):
            if size <= room[n] and not set(other) & set(row):
                other += row
                room[n] -= size
                break
        else:
            merged.append(list(row))
            room.append(width - size)
    return merged


def _in_rows(
    lengths: list[int], rows: list[list[int]], paths: list[list[int]]
) -> tuple[tuple[NodeInRow, ...], ...]:
    """The nodes of each row; what comes before a node stands in its row too."""
    return tuple(
        tuple(NodeInRow(lengths[node], tuple(map(row.index, paths[node][:-1]))) for node in row)
        for row in rows
    )


def _layout(
    lengths: list[int], rows: list[list[int]], paths: list[list[int]], block: int = 1
) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """Where the tokens stand.

    Args:
        lengths: Tokens of each node.
        rows: The nodes of each row.
        paths: The nodes from the root to each node.
        block: The width is a multiple of it. Defaults to 1.

    Returns:
        Three ``(rows, width)`` int64 tensors: which of all tokens each place takes, which node it
        is of (one number more than there are for padding), its position in its branch; and the
        row and place at which each node stands first.
    """
    width = max(sum(lengths[node] for node in row) for row in rows)
    width = -(-width // block) * block
    begins = [0]
    for length in lengths:
        begins.append(begins[-1] + length)
    first = [sum(lengths[node] for node in path[:-1]) for path in paths]
    source = torch.zeros(len(rows), width, dtype=torch.long)
    nodes = torch.full((len(rows), width), len(lengths))
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    places: list[tuple[int, int]] = [(-1, -1)] * len(lengths)
    for r, row in enumerate(rows):
        at = 0
        for node in row:
            span = slice(at, at + lengths[node])
            source[r, span] = torch.arange(begins[node], begins[node + 1])
            nodes[r, span] = node
            positions[r, span] = torch.arange(first[node], first[node] + lengths[node])
            if places[node][0] < 0:
                places[node] = (r, at)
            at = span.stop
    return source, nodes, positions, places
