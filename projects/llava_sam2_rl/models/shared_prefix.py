"""All that is asked of the images of a batch, in one forward pass of the language model.

Every prompt about an image starts with the image's tokens. `SharedPrefixForward` collects prompts
of both kinds (describe a region, find what is described), puts those about one image behind one
copy of it (`PrefixTree`), and runs the language model once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from projects.llava_sam2_rl.losses import chunked_logprobs
from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.generation import Completions
from projects.llava_sam2_rl.models.prefix_tree import PrefixTree
from projects.llava_sam2_rl.models.prompting import (
    region_prompts,
    segmentation_prompts,
    shared_length,
)
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.prompts import ChatTemplate
from projects.llava_sam2_rl.utils.devices import indices_on, to_device, to_host

T = TypeVar('T')


@dataclass(frozen=True, eq=False)
class PromptHandles:
    """N segmentation prompts that were added to a `SharedPrefixForward`.

    A prompt is a conversation of one turn or more, with one ``[SEG]`` or more in each answer.
    """

    #: Of the part of each prompt behind the image.
    nodes: list[int]
    #: N × ``(L,)`` int64, that part's tokens.
    ids: list[Tensor]
    #: N × ``(L,)`` int64, -100 where nothing is supervised.
    labels: list[Tensor]
    #: Sample names for messages, one for each ``[SEG]``.
    names: Sequence[str]
    #: N numbers of ``[SEG]``.
    num_masks: Sequence[int]


@dataclass(frozen=True, eq=False)
class CompletionHandles:
    """N completions behind region prompts of a `SharedPrefixForward`."""

    #: N nodes: the prompt of each completion.
    prompts: list[int]
    #: N nodes of the completions; -1 where a completion is a single token.
    nodes: list[int]
    #: ``(N, T)`` int64.
    completion_ids: Tensor
    #: ``(N, T)`` bool.
    completion_mask: Tensor


class SharedPrefixForward:
    """Prompts about the images of a batch, with what they share computed once.

    Add prompts, call `forward`, then read the answers by the handles that adding returned.

    Args:
        policy: The network.
        batch: The batch.
    """

    def __init__(self, policy: VideoLLaVASAMModel, batch: RegionBatch) -> None:
        self.policy, self.batch = policy, batch
        self._tree = PrefixTree()
        self._roots: dict[tuple[int, ...], int] = {}
        self._hidden: list[Tensor] = []

    def add_descriptions(
        self,
        descriptions: Sequence[str | Tensor],
        images: Sequence[int],
        names: Sequence[str],
        questions: Sequence[str] | None = None,
        template: ChatTemplate | None = None,
        dialogues: Sequence[int] | None = None,
        num_segs: Sequence[int] | None = None,
    ) -> PromptHandles:
        """Asks for the masks of N descriptions; see `segmentation_prompts`."""
        prompts = segmentation_prompts(
            self.policy,
            self.batch,
            descriptions,
            images,
            names,
            questions,
            template,
            dialogues,
            num_segs,
        )
        rows, masks = to_host([prompts.input_ids, prompts.attention_mask.long()])
        lengths = masks.sum(1).tolist()
        nodes, ids, labels = [], [], []
        for i, (image, length) in enumerate(zip(prompts.images, lengths, strict=True)):
            root, start = self._root(image, rows[i, :length].tolist(), prompts.embeds[i])
            nodes.append(self._tree.add_node(prompts.embeds[i, start:length], root))
            ids.append(prompts.input_ids[i, start:length])
            labels.append(prompts.labels[i, start:length])
        names = per_seg(names, num_segs)
        return PromptHandles(nodes, ids, labels, names, prompts.num_masks)

    def add_captions(self, completions: Completions) -> CompletionHandles:
        """Asks how likely N = B·G completions are as descriptions of the batch's B regions.

        Samples without a region have no completion.
        """
        regions = self.batch.subset(self.batch.describable)
        prompts = self._region_nodes(regions.image, regions.prompt_masks, regions.names)
        ids, mask = completions.completion_ids, completions.completion_mask
        nodes = [node for node in prompts for _ in range(len(ids) // len(prompts))]
        behind = add_completions(self._tree, self.policy, nodes, ids, mask)
        return CompletionHandles(nodes, behind, ids, mask)

    def add_likelihoods(
        self,
        images: Sequence[int],
        prompt_masks: Sequence[Tensor],
        names: Sequence[str],
        captions: Sequence[Sequence[int]],
        described: Sequence[int],
    ) -> CompletionHandles:
        """Asks how likely N captions are as descriptions of any regions.

        Args:
            images: Of M regions, indices into the batch's features.
            prompt_masks: M × ``(R, h, w)`` bool, no region without a cell.
            names: M, for messages.
            captions: N captions as token ids, none empty.
            described: N numbers: the region each caption is asked of.
        """
        prompts = self._region_nodes(images, prompt_masks, names)
        device = self.policy.device
        ids = pad_sequence(
            [torch.tensor(row, dtype=torch.long) for row in captions], batch_first=True
        )
        ids = to_device(ids, device)
        lengths = indices_on(device, [len(row) for row in captions])
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        nodes = [prompts[m] for m in described]
        behind = add_completions(self._tree, self.policy, nodes, ids, mask)
        return CompletionHandles(nodes, behind, ids, mask)

    def forward(self) -> None:
        """The pass of the language model; nothing is run where nothing was added."""
        if self._roots:
            self._hidden = self._tree.forward(self.policy)

    def seg_embeddings(self, handles: PromptHandles) -> Tensor:
        """``(M, 256)``: what each ``[SEG]`` prompts SAM 2 with, in the order of the descriptions.

        Raises:
            ValueError: A conversation has not as many ``[SEG]`` as it asks for masks.
        """
        hidden, ids, _ = self._padded(handles)
        return checked_seg_embeddings(self.policy, hidden, ids, handles.names, handles.num_masks)

    def answer_loss(self, handles: PromptHandles) -> Tensor:
        """Mean cross-entropy of the answers of N descriptions."""
        hidden, _, labels = self._padded(handles)
        return self.policy.caption_loss(hidden, labels)

    def per_token_logps(
        self, handles: CompletionHandles, temperature: float, **options: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `completion_logps`."""
        return completion_logps(self.policy, self._hidden, handles, temperature, **options)

    def _region_nodes(
        self, images: Sequence[int], prompt_masks: Sequence[Tensor], names: Sequence[str]
    ) -> list[int]:
        """The nodes of prompts that ask for descriptions of regions."""
        prompts = region_prompts(self.policy, self.batch, images, prompt_masks, names)
        rows, masks = to_host([prompts.input_ids, prompts.attention_mask.long()])
        nodes = []
        for i, image in enumerate(images):
            padding = int((masks[i] == 0).sum())  # on the left
            embeds = prompts.embeds[i, padding:]
            root, start = self._root(image, rows[i, padding:].tolist(), embeds)
            nodes.append(self._tree.add_node(embeds[start:], root))
        return nodes

    def _root(self, image: int, ids: list[int], embeds: Tensor) -> tuple[int, int]:
        """The node of the text's beginning, through the image, and where the rest starts."""
        start = shared_length(self.policy, self.batch, [image], ids)
        key = (image, *ids[:start])
        if key not in self._roots:
            self._roots[key] = self._tree.add_node(embeds[:start])
        return self._roots[key], start

    def _padded(self, handles: PromptHandles) -> tuple[Tensor, Tensor, Tensor]:
        hidden = pad_sequence([self._hidden[node] for node in handles.nodes], batch_first=True)
        pad = self.policy.pad_token_id
        ids = pad_sequence(handles.ids, batch_first=True, padding_value=pad)
        labels = pad_sequence(handles.labels, batch_first=True, padding_value=-100)
        return hidden, ids, labels


def per_seg(values: Sequence[T], num_segs: Sequence[int] | None) -> list[T]:
    """What each of N descriptions has, for each ``[SEG]`` of its answer.

    Args:
        values: N.
        num_segs: N numbers of ``[SEG]``; ``None`` for one each.
    """
    counts = [1] * len(values) if num_segs is None else num_segs
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]


def checked_seg_embeddings(
    policy: VideoLLaVASAMModel,
    hidden: Tensor,
    input_ids: Tensor,
    names: Sequence[str],
    num_masks: Sequence[int],
) -> Tensor:
    """`VideoLLaVASAMModel.seg_embeddings` of M conversations that ask for N masks.

    Args:
        policy: The network.
        hidden: ``(M, L, D)``.
        input_ids: ``(M, L)``.
        names: N names of what is asked for, conversation by conversation.
        num_masks: M numbers of what a conversation asks for; their sum is N.

    Returns:
        ``(N, 256)``.

    Raises:
        ValueError: A conversation has another number of ``[SEG]`` than it asks for masks.
    """
    embeddings, counts = policy.seg_embeddings(hidden, input_ids)
    first = 0
    for expected, found in zip(num_masks, counts, strict=True):
        if found != expected:
            asked = ' and '.join(map(repr, dict.fromkeys(names[first : first + expected])))
            raise ValueError(
                f'sample {asked}: expected {expected} [SEG] in the answer, found {found}'
            )
        first += expected
    return embeddings


def add_completions(
    tree: PrefixTree,
    policy: VideoLLaVASAMModel,
    prompts: Sequence[int],
    completion_ids: Tensor,
    completion_mask: Tensor,
) -> list[int]:
    """Adds a node for each of N completions ``(N, T)`` behind the N nodes of their prompts.

    A completion's last token predicts nothing, so that one of a single token has no node of its
    own; its number is -1.
    """
    table = policy.language_model.get_input_embeddings()
    nodes = []
    for n, length in enumerate(completion_mask.sum(1).tolist()):
        read = completion_ids[n, : max(length - 1, 0)]
        nodes.append(tree.add_node(table(read), prompts[n]) if len(read) else -1)
    return nodes


def completion_logps(
    policy: VideoLLaVASAMModel,
    hidden: Sequence[Tensor],
    handles: CompletionHandles,
    temperature: float,
    *,
    return_entropy: bool = False,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of completions, with gradient to the policy, prompts included.

    Args:
        policy: Has the head.
        hidden: ``(L, D)`` of each node.
        handles: The completions.
        temperature: Sampling temperature that the logits are divided by.
        return_entropy: Also compute the entropy of every position. Defaults to False.
        entropy_gradient: Whether a gradient flows through the entropy. Defaults to True.

    Returns:
        ``(N, T)`` float32, and the entropy ``(N, T)`` or ``None``; 0 outside of the mask.
    """
    mask = handles.completion_mask
    parts = []
    for prompt, node, length in zip(
        handles.prompts, handles.nodes, mask.sum(1).tolist(), strict=True
    ):
        # The prompt's last token predicts the first of the completion.
        parts += [hidden[prompt][-1:]] if length else []
        parts += [hidden[node]] if node >= 0 else []
    head = policy.lm_head
    with policy.weights.of(head):
        found = chunked_logprobs(
            torch.cat(parts),
            head.weight,
            head.bias,
            targets=handles.completion_ids[mask],
            temperature=temperature,
            return_entropy=return_entropy,
            entropy_gradient=entropy_gradient,
        )
    logps, entropy = found if isinstance(found, tuple) else (found, None)

    def at_tokens(x: Tensor) -> Tensor:
        return x.new_zeros(mask.shape).masked_scatter(mask, x)

    return at_tokens(logps), None if entropy is None else at_tokens(entropy)
