"""Texts as token ids and back.

A conversation is encoded piece by piece: each turn's instruction, its answer with what ends it,
and the separator, none of which merges with the next. ``<|user|>``, ``<|end|>`` and
``<|assistant|>`` of the phi3_chat template are plain text for the Qwen2.5 tokenizer of Sa2VA-4B:
``<|end|>`` is several tokens, and the first of them may merge with what stands before it (``.<`` is
one token). So a stop is found in the decoded text, never by a token id, and a caption is cut there
as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from projects.llava_sam2_rl.prompts.special_tokens import IMG_CONTEXT, SEG
from projects.llava_sam2_rl.prompts.templates import ChatTemplate, cut_at_stop, find_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The label of what is not learnt: ``xtuner.utils.IGNORE_INDEX``.
IGNORE_INDEX = -100

#: Tokenizers that Sa2VA is trained with and that begin no text with a token of their own, whatever
#: their ``bos_token`` is: xtuner's list, and the slow class of Qwen2, which has none.
_WITHOUT_BOS = ('QWenTokenizer', 'QWen2Tokenizer', 'Qwen2TokenizerFast', 'Qwen2Tokenizer')


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id that stands before a whole conversation, where the tokenizer has one."""
    if type(tokenizer).__name__ in _WITHOUT_BOS or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a piece of text, without the tokens a tokenizer would put around it."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | torch.Tensor) -> str:
    """The text of token ids, special tokens included, with its blanks as they are."""
    return tokenizer.decode(
        ids,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
        # A slow tokenizer would put a blank on both sides of every special token.
        spaces_between_special_tokens=False,
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of what generation starts from: a formatted turn, behind ``bos`` where it is."""
    return bos_ids(tokenizer) + encode_text(tokenizer, text)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    template: str | ChatTemplate,
    turns: Sequence[tuple[str, str]],
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation, piece by piece as in the official training.

    ``bos`` stands at the very start only, if the tokenizer has one; a separator stands behind every
    turn, the last one too. Only answers and what ends them have labels.

    Args:
        tokenizer: Of the model.
        template: Its name, or the template itself.
        turns: ``(question, answer)``; the first question holds the image's text (`image_text`).

    Returns:
        ``(input_ids, labels)`` of equal length; labels are -100 where nothing is learnt.

    Raises:
        ValueError: There is no turn, or no template of that name.
    """
    if not turns:
        raise ValueError('a conversation needs at least one question and answer')
    template = find_template(template)
    separator = encode_text(tokenizer, template.separator) if template.separator else []
    ids = bos_ids(tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    for question, answer in turns:
        asked = encode_text(tokenizer, template.ask(question))
        said = encode_text(tokenizer, template.answer(answer))
        ids += asked + said + separator
        labels += [IGNORE_INDEX] * len(asked) + said + [IGNORE_INDEX] * len(separator)
    return ids, labels


def _check_count(
    input_ids: Sequence[int] | torch.Tensor,
    token_id: int,
    expected: int,
    sample_id: str,
    token: str,
    what: str,
) -> None:
    ids = input_ids.flatten().tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
    found = ids.count(token_id)
    if found != expected:
        raise ValueError(
            f'{sample_id}: {found} {token} tokens in the prompt, but {expected} {what}'
        )


def check_image_tokens(
    input_ids: Sequence[int] | torch.Tensor, image_token_id: int, expected: int, sample_id: str
) -> None:
    """Checks that a sequence has one ``<IMG_CONTEXT>`` per image and region embedding.

    Raises:
        ValueError: It has not; the message names the sample and both numbers.
    """
    _check_count(input_ids, image_token_id, expected, sample_id, IMG_CONTEXT, 'embeddings')


def check_seg_tokens(
    input_ids: Sequence[int] | torch.Tensor, seg_token_id: int, expected: int, sample_id: str
) -> None:
    """Checks that a sequence has one ``[SEG]`` per mask.

    Raises:
        ValueError: It has not; the message names the sample and both numbers.
    """
    _check_count(input_ids, seg_token_id, expected, sample_id, SEG, 'masks')


def pad_batch(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    side: str,
    labels: Sequence[Sequence[int]] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, torch.Tensor]:
    """Pads token id sequences to one length N.

    Args:
        sequences: B lists of token ids.
        pad_id: Id that fills ``input_ids``.
        side: ``'right'`` for the loss, ``'left'`` for generation.
        labels: B lists as long as their sequences.
        device: Where the tensors go.

    Returns:
        ``input_ids`` (B, N) int64; ``attention_mask`` (B, N) bool; ``position_ids`` (B, N) int64,
        counting from 0 at each sequence's first token (and 0 on left padding); with ``labels``
        also ``labels`` (B, N) int64, -100 on the padding.

    Raises:
        ValueError: No sequences, an unknown side, or labels of another length than their sequence.
    """
    if side not in ('left', 'right'):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    if not sequences:
        raise ValueError('pad_batch needs at least one sequence')
    lengths = [len(sequence) for sequence in sequences]
    if labels is not None and [len(row) for row in labels] != lengths:
        raise ValueError(
            f'labels have lengths {[len(row) for row in labels]}, the sequences {lengths}'
        )
    width = max(lengths)

    def fill(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        padded = [
            [*[value] * (width - len(row)), *row]
            if side == 'left'
            else [*row, *[value] * (width - len(row))]
            for row in rows
        ]
        return torch.tensor(padded, dtype=torch.int64, device=device)

    attention_mask = fill([[1] * length for length in lengths], 0).bool()
    if side == 'right':
        position_ids = torch.arange(width, device=device).expand(len(lengths), width).clone()
    else:
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    batch = {
        'input_ids': fill(sequences, pad_id),
        'attention_mask': attention_mask,
        'position_ids': position_ids,
    }
    if labels is not None:
        batch['labels'] = fill(labels, IGNORE_INDEX)
    return batch


def truncate_at_stop(
    completion_ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    stop_strings: Sequence[str],
    eos_token_ids: Sequence[int] | None = None,
) -> tuple[list[str], torch.Tensor]:
    """Finds where each completion ends.

    Args:
        completion_ids: (B, T) int64, the generated tokens alone.
        tokenizer: Decodes them.
        stop_strings: Texts that end a completion.
        eos_token_ids: Ids that end a completion; the tokenizer's ``eos_token_id`` by default.

    Returns:
        The texts before the stop (special tokens kept, see :func:`clean_caption`), and the
        completion mask (B, T) bool: True through the token that completes the first stop string,
        or through the first eos, whichever comes first; all True where neither comes.
    """
    if eos_token_ids is None:
        eos_token_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stop_ids = frozenset(eos_token_ids)

    texts: list[str] = []
    lengths: list[int] = []
    for ids in completion_ids.tolist():
        content = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
        length = min(content + 1, len(ids))
        text = decode_text(tokenizer, ids[:content])
        if any(stop in text for stop in stop_strings):
            # A prefix that holds a stop string keeps it when it grows: the first is found by
            # bisection. A character cut in the middle only shows at the end of a prefix.
            low, high = 1, content
            while low < high:
                middle = (low + high) // 2
                if any(stop in decode_text(tokenizer, ids[:middle]) for stop in stop_strings):
                    high = middle
                else:
                    low = middle + 1
            length, text = low, cut_at_stop(text, stop_strings)
        texts.append(text)
        lengths.append(length)
    steps = torch.arange(completion_ids.shape[1], device=completion_ids.device)
    ends = torch.tensor(lengths, dtype=torch.int64, device=completion_ids.device)
    return texts, steps[None, :] < ends[:, None]
