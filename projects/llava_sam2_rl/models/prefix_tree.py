"""Many sequences that begin alike in one forward pass, every common part computed once.

What is asked of an image starts with the image: its 256 tokens or more stand before every prompt
about it, before the G completions of a region as before the G descriptions of a return trip. Such
sequences form a tree. Its nodes are laid one behind the other in a row, with positions counted
along each branch, and a mask lets a token see its own branch only (tree attention, Miao et al.
2023, "SpecInfer"). It is one ordinary pass without a cache: gradients flow to the common parts from
all branches, and activation checkpointing works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel

#: Rows end here where they can: attention grows with the square of a row. Another row computes the
#: common part again.
MAX_ROW = 2048


class PackedSequences:
    """A forest of sequences; see the module's text."""

    def __init__(self) -> None:
        self._embeds: list[Tensor] = []
        self._parents: list[int | None] = []

    def add(self, embeds: Tensor, parent: int | None = None) -> int:
        """A node behind another, or the beginning of a new tree.

        Args:
            embeds: ``(L, D)``, L >= 1.
            parent: What `add` returned for the node that comes before.

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

    def run(self, policy: VideoLLaVASAMModel) -> list[Tensor]:
        """``(L, D)`` hidden states of every node, without the head."""
        device = self._embeds[0].device
        lengths = [len(x) for x in self._embeds]
        rows = self._rows(lengths)
        width = max(sum(lengths[node] for node in row) for row in rows)
        begins = [0]
        for length in lengths:
            begins.append(begins[-1] + length)
        chains = [self._chain(node) for node in range(len(lengths))]
        first = [sum(lengths[node] for node in chain[:-1]) for chain in chains]

        # Where a token of a row comes from, which node it is of, and its position in its branch.
        source = torch.zeros(len(rows), width, dtype=torch.long)
        nodes = torch.full((len(rows), width), len(lengths))
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        found: list[tuple[int, int]] = [(-1, -1)] * len(lengths)
        for r, row in enumerate(rows):
            at = 0
            for node in row:
                span = slice(at, at + lengths[node])
                source[r, span] = torch.arange(begins[node], begins[node + 1])
                nodes[r, span] = node
                positions[r, span] = torch.arange(first[node], first[node] + lengths[node])
                if found[node][0] < 0:
                    found[node] = (r, at)
                at = span.stop
        # The last entry is the padding's, which sees and is seen by itself alone.
        sees = torch.zeros(len(lengths) + 1, len(lengths) + 1, dtype=torch.bool)
        for node, chain in enumerate(chains):
            sees[node, chain] = True
        source, nodes, positions, sees = (x.to(device) for x in (source, nodes, positions, sees))
        allowed = sees[nodes[:, :, None], nodes[:, None, :]]
        allowed &= positions[:, None, :] <= positions[:, :, None]
        allowed |= torch.eye(width, dtype=torch.bool, device=device)
        packed = torch.cat(self._embeds)[source]
        hidden = policy.hidden_states(packed, allowed, positions)
        return [hidden[r, at : at + n] for (r, at), n in zip(found, lengths, strict=True)]

    def _chain(self, node: int) -> list[int]:
        """From the root to the node."""
        chain = [node]
        while (parent := self._parents[chain[0]]) is not None:
            chain.insert(0, parent)
        return chain

    def _rows(self, lengths: list[int]) -> list[list[int]]:
        """The nodes of each row; a common part stands wherever some of its branches do."""
        trees: dict[int, list[list[int]]] = {}
        inner = set(self._parents)
        for leaf in range(len(lengths)):
            if leaf in inner:
                continue
            chain = self._chain(leaf)
            rows = trees.setdefault(chain[0], [[]])
            new = [node for node in chain if node not in rows[-1]]
            if rows[-1] and sum(lengths[node] for node in rows[-1] + new) > MAX_ROW:
                rows.append([])
                new = chain
            rows[-1] += new
        # The longest row says how wide the batch is; shorter ones share a row where they fit.
        found = [row for rows in trees.values() for row in rows]
        sizes = {id(row): sum(lengths[node] for node in row) for row in found}
        width = max(sizes.values())
        merged: list[list[int]] = []
        room: list[int] = []
        for row in sorted(found, key=lambda row: -sizes[id(row)]):
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
