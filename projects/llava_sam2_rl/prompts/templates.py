"""Prompts, answers and captions as text, as Sa2VA checkpoints were trained on them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from projects.llava_sam2_rl.prompts.special_tokens import (
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    SPECIAL_PATTERN,
    VP_END,
    VP_START,
)

# xtuner's `PROMPT_TEMPLATE.phi3_chat`, written out: every data loading process imports this file,
# and xtuner brings 175 MiB with it. A test compares the two.
SUFFIX = '<|end|>'
SEPARATOR = '\n'
TURN = '<|user|>\n{input}<|end|>\n<|assistant|>\n'
STOP_STRINGS = (SUFFIX,)

#: The names of chat templates that a checkpoint's config.json may hold, those of xtuner's
#: `PROMPT_TEMPLATE`, and the texts that end an answer in each.
TEMPLATE_STOP_STRINGS: dict[str, tuple[str, ...]] = {
    'phi3_chat': STOP_STRINGS,
    'internlm_chat': ('<eoa>',),
    'internlm2_chat': ('<|im_end|>',),
    'moss_sft': ('<eoc>', '<eom>'),
    'qwen_chat': ('<|im_end|>', '<|endoftext|>'),
    'deepseek_v2': ('<｜end▁of▁sentence｜>',),
    'minicpm3': ('<|im_end|>', '<|endoftext|>'),
    'gemma': ('<end_of_turn>',),
    'cohere_chat': ('<|END_OF_TURN_TOKEN|>',),
    'llama3_chat': ('<|eot_id|>',),
    **dict.fromkeys(
        (
            'default',
            'zephyr',
            'llama2_chat',
            'code_llama_chat',
            'chatglm2',
            'chatglm3',
            'baichuan_chat',
            'baichuan2_chat',
            'wizardlm',
            'wizardcoder',
            'vicuna',
            'deepseek_coder',
            'deepseekcoder',
            'deepseek_moe',
            'mistral',
            'mixtral',
            'minicpm',
        ),
        (),
    ),
}
#: The region prompt has a newline before ``<|assistant|>``, the segmentation prompt has none.
_REGION_TURN = TURN
_SEGMENTATION_TURN = TURN.replace(f'{SUFFIX}\n', SUFFIX, 1)

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

_CHAT_MARKER_PATTERN = re.compile(r'<\|[^|<>\s]*\|>')


def image_text(num_image_tokens: int) -> str:
    """What stands before everything that is said about an image."""
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
        f'{image_text(num_image_tokens)}'
        f'There are {len(counts)} part regions in the picture: {regions}.\n{instruction}'
    )
    return _REGION_TURN.format(input=text)


def segmentation_prompt(
    num_image_tokens: int, description: str, question: str | None = None
) -> str:
    """The user turn that asks for the mask of what ``description`` describes.

    Args:
        num_image_tokens: ``<IMG_CONTEXT>`` tokens of the image, summed over its tiles.
        description: Noun phrase, may be empty; see :func:`strip_final_period`.
        question: Template that holds ``{description}``; the first of
            :data:`SEGMENTATION_QUESTIONS` by default.

    Raises:
        ValueError: The description holds a special token, which would be taken for an image
            position or a mask, or the question has no ``{description}``.
    """
    found = SPECIAL_PATTERN.search(description)
    if found:
        raise ValueError(
            f'the description {description!r} holds the special token {found.group()!r}: '
            'pass it through clean_caption() first'
        )
    question = SEGMENTATION_QUESTIONS[0] if question is None else question
    if '{description}' not in question:
        raise ValueError(f'the question {question!r} has no {{description}}')
    asked = question.replace('{description}', description)
    return _SEGMENTATION_TURN.format(input=f'{image_text(num_image_tokens)}{asked}')


def segmentation_prompt_around(
    num_image_tokens: int, question: str | None = None
) -> tuple[str, str]:
    """The segmentation prompt before and behind its description, for embeddings in its place."""
    gap = '\0'
    before, behind = segmentation_prompt(num_image_tokens, gap, question).split(gap)
    return before, behind


def caption_answer(caption: str) -> str:
    """The assistant's turn of a region prompt: the caption and the end marker."""
    return f'{caption}{SUFFIX}'


def segmentation_answer(answer: str = SEGMENTATION_ANSWERS[0]) -> str:
    """The assistant's turn of a segmentation prompt: the answer and the end marker."""
    return f'{answer}{SUFFIX}'


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    found = [at for at in (text.find(stop) for stop in stop_strings) if at >= 0]
    return text[: min(found)] if found else text


def clean_caption(text: str) -> str:
    """What a generated text says: up to the first stop string, without markers, on one line.

    Special tokens and chat markers (``<|...|>``) become spaces, runs of whitespace one space.
    """
    text = cut_at_stop(text, STOP_STRINGS)
    text = SPECIAL_PATTERN.sub(' ', text)
    text = _CHAT_MARKER_PATTERN.sub(' ', text)
    return ' '.join(text.split())


def strip_final_period(caption: str) -> str:
    """A cleaned caption as it stands inside a segmentation question: without its final ``.``."""
    return caption.rstrip().rstrip('.').rstrip()
