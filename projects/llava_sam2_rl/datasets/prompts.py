"""The texts that Sa2VA checkpoints were trained on, and their way into token ids and back.

``<|user|>``, ``<|end|>`` and ``<|assistant|>`` of the phi3_chat template are plain text for the
Qwen2.5 tokenizer of Sa2VA-4B: ``<|end|>`` is several tokens, and the first of them may merge with
what stands before it (``.<`` is one token). So a stop is found in the decoded text, never by a
token id, and a caption is cut there as text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMG_START, IMG_END, IMG_CONTEXT = '<img>', '</img>', '<IMG_CONTEXT>'
SEG = '[SEG]'
P_START, P_END = '<p>', '</p>'
VP_START, VP_END = '<vp>', '</vp>'
#: Every token that a Sa2VA tokenizer has to hold as one id.
SPECIAL_TOKENS = (IMG_START, IMG_END, IMG_CONTEXT, SEG, P_START, P_END, VP_START, VP_END)

#: The label of what is not learnt: ``xtuner.utils.IGNORE_INDEX``.
IGNORE_INDEX = -100
# xtuner's `PROMPT_TEMPLATE.phi3_chat`, written out: every data loading process imports this file,
# and xtuner brings 175 MiB with it. A test compares the two.
_SUFFIX = '<|end|>'
_SEPARATOR = '\n'
_TURN = '<|user|>\n{input}<|end|>\n<|assistant|>\n'
STOP_STRINGS = (_SUFFIX,)
#: The region prompt has a newline before ``<|assistant|>``, the segmentation prompt has none.
_REGION_TURN = _TURN
_SEGMENTATION_TURN = _TURN.replace(f'{_SUFFIX}\n', _SUFFIX, 1)

REGION_INSTRUCTION = 'Please generate a detailed description for the given image region.'

SEGMENTATION_QUESTIONS = (
    'Please segment {description} in this image.',
    'Can you segment {description} in this image?',
    'Could you please segment {description} in the picture?',
    'Segment {description} in this image and give its mask.',
    'What is {description} in this image? Please respond with a segmentation mask.',
    'Where is {description} in this picture? Please answer with a segmentation mask.',
)

SEGMENTATION_ANSWERS = (
    'It is [SEG].',
    'Sure, [SEG].',
    'Sure, it is [SEG].',
    'Sure, the segmentation result is [SEG].',
    '[SEG].',
)

_SPECIAL_PATTERN = re.compile('|'.join(re.escape(token) for token in SPECIAL_TOKENS))
_CHAT_MARKER_PATTERN = re.compile(r'<\|[^|<>\s]*\|>')


# -- special tokens ------------------------------------------------------------------------------


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The id of each of :data:`SPECIAL_TOKENS`.

    Raises:
        ValueError: A token is not one id of this tokenizer; the message names all such tokens.
    """
    ids, missing = {}, []
    for token in SPECIAL_TOKENS:
        encoded = tokenizer.encode(token, add_special_tokens=False)
        if len(encoded) == 1 and tokenizer.convert_ids_to_tokens(encoded[0]) == token:
            ids[token] = encoded[0]
        else:
            missing.append(token)
    if missing:
        raise ValueError(
            f'the tokenizer {tokenizer.name_or_path!r} lacks the special tokens '
            f'{", ".join(missing)}: take the tokenizer of a Sa2VA checkpoint, or call '
            'add_special_tokens(tokenizer) and resize the embeddings'
        )
    return ids


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds what is missing of :data:`SPECIAL_TOKENS`, in their order.

    Returns:
        The number of tokens added; the model's embeddings have to grow by as many.
    """
    return tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)


# -- prompts as text -----------------------------------------------------------------------------


def _image_text(num_image_tokens: int) -> str:
    if num_image_tokens < 1:
        raise ValueError(f'a prompt needs at least one image token, got {num_image_tokens}')
    return f'{IMG_START}{IMG_CONTEXT * num_image_tokens}{IMG_END}\n'


def region_prompt(
    num_image_tokens: int,
    region_token_counts: Sequence[int],
    instruction: str = REGION_INSTRUCTION,
) -> str:
    """The user turn that asks for a description of one or more regions.

    Args:
        num_image_tokens: ``<IMG_CONTEXT>`` tokens of the image, summed over its tiles.
        region_token_counts: Set cells of each region's ``prompt_masks`` grid.
        instruction: What is asked about the regions.

    Raises:
        ValueError: No region, or a region without a single cell.
    """
    counts = list(region_token_counts)
    if not counts or min(counts) < 1:
        raise ValueError(
            f'a region prompt needs one or more regions of at least one cell each, got {counts}'
        )
    regions = ', '.join(
        f'region{i}{VP_START}{IMG_CONTEXT * count}{VP_END}' for i, count in enumerate(counts, 1)
    )
    text = (
        f'{_image_text(num_image_tokens)}'
        f'There are {len(counts)} part regions in the picture: {regions}.\n{instruction}'
    )
    return _REGION_TURN.format(input=text)


def segmentation_prompt(
    num_image_tokens: int, description: str, question: str | None = None
) -> str:
    """The user turn that asks for the mask of what ``description`` describes.

    Args:
        num_image_tokens: ``<IMG_CONTEXT>`` tokens of the image, summed over its tiles.
        description: Noun phrase, may be empty; see :func:`as_description`.
        question: Template that holds ``{description}``; the first of
            :data:`SEGMENTATION_QUESTIONS` by default.

    Raises:
        ValueError: The description holds a special token, which would be taken for an image
            position or a mask, or the question has no ``{description}``.
    """
    found = _SPECIAL_PATTERN.search(description)
    if found:
        raise ValueError(
            f'the description {description!r} holds the special token {found.group()!r}: '
            'pass it through clean_caption() first'
        )
    question = SEGMENTATION_QUESTIONS[0] if question is None else question
    if '{description}' not in question:
        raise ValueError(f'the question {question!r} has no {{description}}')
    asked = question.replace('{description}', description)
    return _SEGMENTATION_TURN.format(input=f'{_image_text(num_image_tokens)}{asked}')


def segmentation_prompt_around(
    num_image_tokens: int, question: str | None = None
) -> tuple[str, str]:
    """The segmentation prompt before and behind its description, for embeddings in its place."""
    gap = '\0'
    before, behind = segmentation_prompt(num_image_tokens, gap, question).split(gap)
    return before, behind


def caption_answer(caption: str) -> str:
    """The assistant's turn of a region prompt: the caption and the end marker."""
    return f'{caption}{_SUFFIX}'


def segmentation_answer(answer: str = SEGMENTATION_ANSWERS[0]) -> str:
    """The assistant's turn of a segmentation prompt: the answer and the end marker."""
    return f'{answer}{_SUFFIX}'


# -- captions ------------------------------------------------------------------------------------


def _cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    found = [at for at in (text.find(stop) for stop in stop_strings) if at >= 0]
    return text[: min(found)] if found else text


def clean_caption(text: str) -> str:
    """What a generated text says: up to the first stop string, without markers, on one line.

    Special tokens and chat markers (``<|...|>``) become spaces, runs of whitespace one space.
    """
    text = _cut_at_stop(text, STOP_STRINGS)
    text = _SPECIAL_PATTERN.sub(' ', text)
    text = _CHAT_MARKER_PATTERN.sub(' ', text)
    return ' '.join(text.split())


def as_description(caption: str) -> str:
    """A cleaned caption as it stands inside a segmentation question: without its final ``.``."""
    return caption.rstrip().rstrip('.').rstrip()


# -- token ids -----------------------------------------------------------------------------------


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text``, without the tokens a tokenizer would put around it."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> tuple[list[int], list[int]]:
    """Ids and labels of a prompt and its answer, tokenized apart as in the official training.

    Returns:
        ``(input_ids, labels)`` of equal length; labels are -100 on the prompt.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    answer_ids = encode_prompt(tokenizer, answer)
    return prompt_ids + answer_ids, [IGNORE_INDEX] * len(prompt_ids) + answer_ids


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    num_image_tokens: int,
    turns: Sequence[tuple[str, str]],
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation about a whole image; see :func:`encode_pair`.

    The image stands before the first question; only answers and their end markers have labels.

    Raises:
        ValueError: There is no turn.
    """
    if not turns:
        raise ValueError('a conversation needs at least one question and answer')
    ids: list[int] = []
    labels: list[int] = []
    for n, (question, answer) in enumerate(turns):
        image = _image_text(num_image_tokens) if n == 0 else ''
        prompt = _TURN.format(input=f'{image}{question}')
        new_ids, new_labels = encode_pair(tokenizer, prompt, f'{answer}{_SUFFIX}')
        ids += new_ids
        labels += new_labels
        if n < len(turns) - 1:
            # Tokenized apart and without a label, as xtuner does it.
            separator = encode_prompt(tokenizer, _SEPARATOR)
            ids += separator
            labels += [IGNORE_INDEX] * len(separator)
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
    stop_strings: Sequence[str] = STOP_STRINGS,
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

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts: list[str] = []
    lengths: list[int] = []
    for ids in completion_ids.tolist():
        content = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
        length = min(content + 1, len(ids))
        text = decode(ids[:content])
        if any(stop in text for stop in stop_strings):
            # A prefix that holds a stop string keeps it when it grows: the first is found by
            # bisection. A character cut in the middle only shows at the end of a prefix.
            low, high = 1, content
            while low < high:
                middle = (low + high) // 2
                if any(stop in decode(ids[:middle]) for stop in stop_strings):
                    high = middle
                else:
                    low = middle + 1
            length, text = low, _cut_at_stop(text, stop_strings)
        texts.append(text)
        lengths.append(length)
    steps = torch.arange(completion_ids.shape[1], device=completion_ids.device)
    ends = torch.tensor(lengths, dtype=torch.int64, device=completion_ids.device)
    return texts, steps[None, :] < ends[:, None]
