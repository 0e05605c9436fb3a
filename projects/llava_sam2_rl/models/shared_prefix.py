"""What is asked of the images of a batch, answered in one forward pass of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from projects.llava_sam2_rl.losses import chunked_logprobs
from projects.llava_sam2_rl.models.prefix_tree import PrefixTree

if TYPE_CHECKING:
    from projects.llava_sam2_rl.models.dual_loop import DualLoopModel, LoopBatch
    from projects.llava_sam2_rl.models.generation import Completions
    from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel


@dataclass(frozen=True, eq=False)
class Asked:
    """N descriptions that a `Reading` is to find.

    Args:
        nodes: Of the part behind the image.
        ids: N × ``(L,)`` int64, that part's tokens.
        labels: N × ``(L,)`` int64, -100 where nothing is supervised.
    """

    nodes: list[int]
    ids: list[Tensor]
    labels: list[Tensor]


class Reading:
    """Prompts about the images of a batch, with what they share computed once.

    Args:
        loop: The wrapper.
        batch: The batch.
    """

    def __init__(self, loop: DualLoopModel, batch: LoopBatch) -> None:
        self.loop, self.batch = loop, batch
        self._packed = PrefixTree()
        self._roots: dict[tuple[int, ...], int] = {}
        self._hidden: list[Tensor] | None = None

    def add_descriptions(
        self, descriptions: Sequence[str | Tensor], images: Sequence[int], names: Sequence[str]
    ) -> Asked:
        """Asks for the masks of N descriptions; see `DualLoopModel.segment_descriptions`."""
        data, _ = self.loop.segmentation_inputs(descriptions, images, self.batch, names)
        lengths = data['attention_mask'].sum(1).tolist()
        nodes, ids, labels = [], [], []
        for i, (image, length) in enumerate(zip(images, lengths, strict=True)):
            row = data['input_ids'][i, :length]
            root, start = self._root(image, row, data['embeds'][i])
            nodes.append(self._packed.add_node(data['embeds'][i, start:length], root))
            ids.append(row[start:])
            labels.append(data['labels'][i, start:length])
        return Asked(nodes, ids, labels)

    def add_regions(self) -> list[int]:
        """Asks for descriptions of the regions of all B samples: the nodes of their prompts."""
        batch, (data, _) = self.batch, self.loop.region_inputs(self.batch)
        nodes = []
        for i, image in enumerate(batch.image):
            real = data['attention_mask'][i]
            embeds = data['embeds'][i][real]
            root, start = self._root(image, data['input_ids'][i][real], embeds)
            nodes.append(self._packed.add_node(embeds[start:], root))
        return nodes

    def add_completions(self, prompts: Sequence[int], completions: Completions) -> list[int]:
        """Puts N = B·G completions behind B prompts; for `logps`."""
        return add_completions(self._packed, self.loop.policy, prompts, completions)

    def run(self) -> None:
        """The forward pass; the answers are there behind it."""
        self._hidden = self._packed.forward(self.loop.policy)

    def seg_prompts(self, asked: Asked, names: Sequence[str]) -> Tensor:
        """``(N, 256)``: what each description prompts SAM 2 with.

        Raises:
            ValueError: A sequence has not exactly one ``[SEG]``.
        """
        hidden, ids, _ = self._padded(asked)
        return self.loop.at_seg(hidden, ids, names)

    def answer_loss(self, asked: Asked) -> Tensor:
        """Mean cross-entropy of the answers of N descriptions."""
        hidden, _, labels = self._padded(asked)
        return self.loop.policy.caption_loss(hidden, labels)

    def logps(
        self,
        prompts: Sequence[int],
        nodes: Sequence[int],
        completions: Completions,
        temperature: float,
        **options: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`completion_logps` of what `add_regions` and `add_completions` asked for."""
        assert self._hidden is not None
        policy = self.loop.policy
        return completion_logps(
            policy, self._hidden, prompts, nodes, completions, temperature, **options
        )

    def _root(self, image: int, ids: Tensor, embeds: Tensor) -> tuple[int, int]:
        """The node of the text's beginning, through the image, and where the rest starts."""
        start = self.loop.shared_start(self.batch, [image], ids.tolist())
        key = (image, *ids[:start].tolist())
        if key not in self._roots:
            self._roots[key] = self._packed.add_node(embeds[:start])
        return self._roots[key], start

    def _padded(self, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
        assert self._hidden is not None
        hidden = pad_sequence([self._hidden[node] for node in asked.nodes], batch_first=True)
        ids = pad_sequence(asked.ids, batch_first=True, padding_value=self.loop.policy.pad_token_id)
        labels = pad_sequence(asked.labels, batch_first=True, padding_value=-100)
        return hidden, ids, labels


def add_completions(
    packed: PrefixTree,
    policy: VideoLLaVASAMModel,
    prompts: Sequence[int],
    completions: Completions,
) -> list[int]:
    """A node for each of N = B·G completions behind the B nodes of their prompts.

    A completion's last token predicts nothing, so that one of a single token has no node of its
    own; its number is -1.
    """
    group = len(completions.completion_ids) // len(prompts)
    table = policy.language_model.get_input_embeddings()
    nodes = []
    for n, length in enumerate(completions.completion_mask.sum(1).tolist()):
        read = completions.completion_ids[n, : max(length - 1, 0)]
        nodes.append(packed.add_node(table(read), prompts[n // group]) if len(read) else -1)
    return nodes


def completion_logps(
    policy: VideoLLaVASAMModel,
    hidden: Sequence[Tensor],
    prompts: Sequence[int],
    nodes: Sequence[int],
    completions: Completions,
    temperature: float,
    *,
    return_entropy: bool = False,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of completions, with gradient to the policy, prompts included.

    Args:
        policy: Has the head.
        hidden: ``(L, D)`` of each node.
        prompts: B nodes.
        nodes: Of `add_completions`.
        completions: N of them.
        temperature: Of the sampling.
        return_entropy: Also compute the entropy of every position.
        entropy_gradient: Whether a gradient flows through it.

    Returns:
        ``(N, T)`` float32, and the entropy ``(N, T)`` or ``None``; 0 outside of the mask.
    """
    group = len(nodes) // len(prompts)
    parts = []
    for n, (node, length) in enumerate(
        zip(nodes, completions.completion_mask.sum(1).tolist(), strict=True)
    ):
        # The prompt's last token predicts the first of the completion.
        parts += [hidden[prompts[n // group]][-1:]] if length else []
        parts += [hidden[node]] if node >= 0 else []
    head, mask = policy.lm_head, completions.completion_mask
    found = chunked_logprobs(
        torch.cat(parts),
        head.weight,
        getattr(head, 'bias', None),
        targets=completions.completion_ids[mask],
        temperature=temperature,
        return_entropy=return_entropy,
        entropy_gradient=entropy_gradient,
    )
    logps, entropy = found if return_entropy else (found, None)
    return tuple(
        None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x)
        for x in (logps, entropy)
    )
