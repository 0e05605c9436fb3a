"""What is asked about an image and answered, before a chat template goes around it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from projects.llava_sam2_rl.prompts.special_tokens import (
    CHAT_MARKER,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    SEG,
    SPECIAL_PATTERN,
    VP_END,
    VP_START,
)
from projects.llava_sam2_rl.prompts.templates import ALL_STOP_STRINGS, cut_at_stop

#: Stands in a region question for the region's name.
REGION = 'region{i}'
#: Stands in a segmentation question for what is to be found.
DESCRIPTION = '{description}'

#: The first is one that Sa2VA was trained on; the others say the same in other words.
REGION_QUESTIONS = (
    'Please describe the region region{i} in the image in detail.',
    'What can be seen in region{i} of this picture? Please describe it in detail.',
    'Tell me in detail what region{i} shows.',
    'Describe what lies inside region{i} as precisely as you can.',
    'Please look at region{i} and write a detailed description of it.',
    'Could you describe at length what is marked by region{i}?',
    'Give a full description of the part of the image named region{i}.',
    'How would you describe region{i} of the photo? Please go into detail.',
)
#: Asked in rollouts, evaluation and inference.
REGION_QUESTION = REGION_QUESTIONS[0]

SEGMENTATION_QUESTIONS = (
    'Please segment {description} in this image.',
    'Can you segment {description} in this image?',
    'Could you please segment {description} in the picture?',
    'Segment {description} in this image and give its mask.',
    'What is {description} in this image? Please respond with a segmentation mask.',
    'Where is {description} in this picture? Please answer with a segmentation mask.',
)
#: Asked in rollouts, validation and inference.
SEGMENTATION_QUESTION = SEGMENTATION_QUESTIONS[0]
#: Asked by the official evaluation on RefCOCO, RefCOCO+ and RefCOCOg: with a blank at the start.
REFCOCO_QUESTION = ' Please segment {description} in this image.'

SEGMENTATION_ANSWERS = (
    'It is [SEG].',
    'Sure, [SEG].',
    'Sure, it is [SEG].',
    'Sure, the segmentation result is [SEG].',
    '[SEG].',
)

_CHAT_MARKER_PATTERN = re.compile(CHAT_MARKER)


def segmentation_answer(num_masks: int = 1) -> str:
    """The answer that is given in training: ``It is [SEG], [SEG] and [SEG].`` for three masks.

    With one mask it is the first of the official answers; the official code has none with more.

    Raises:
        ValueError: There is no mask.
    """
    if num_masks < 1:
        raise ValueError(f'an answer needs at least one mask, got {num_masks}')
    listed = ', '.join([SEG] * (num_masks - 1))
    return SEGMENTATION_ANSWERS[0].replace(SEG, f'{listed} and {SEG}' if listed else SEG)


def image_text(num_image_tokens: int) -> str:
    """What stands before everything that is said about an image: its tokens and a newline.

    Raises:
        ValueError: There is no token.
    """
    if num_image_tokens < 1:
        raise ValueError(f'a prompt needs at least one image token, got {num_image_tokens}')
    return f'{IMG_START}{IMG_CONTEXT * num_image_tokens}{IMG_END}\n'


def region_list(cells_per_region: Sequence[int]) -> str:
    """The sentence that lists the regions of an image, in the order of their masks.

    Args:
        cells_per_region: Set cells of each region's ``prompt_masks`` grid: so many
            ``<IMG_CONTEXT>`` stand for it.

    Raises:
        ValueError: No region, or a region without a single cell.
    """
    counts = list(cells_per_region)
    if not counts or min(counts) < 1:
        raise ValueError(
            f'a region prompt needs one or more regions of at least one cell each, got {counts}'
        )
    regions = ', '.join(
        f'region{i}{VP_START}{IMG_CONTEXT * count}{VP_END}' for i, count in enumerate(counts, 1)
    )
    return f'There are {len(counts)} part regions in the picture: {regions}.'


def check_region_question(question: str) -> str:
    """The question, if it names its region.

    Raises:
        ValueError: It does not.
    """
    if REGION not in question:
        raise ValueError(
            f'the region question {question!r} names no region: write {REGION!r} where its name '
            f'belongs, as in {REGION_QUESTION!r}'
        )
    return question


def check_segmentation_question(question: str) -> str:
    """The question, if it has a place for the description.

    Raises:
        ValueError: It has none.
    """
    if DESCRIPTION not in question:
        raise ValueError(
            f'the segmentation question {question!r} has no {DESCRIPTION}: write it where the '
            'description belongs'
        )
    return question


@dataclass(frozen=True)
class Questions:
    """What a model is asked in rollouts, evaluation and inference.

    Args:
        region: For a description; ``region{i}`` in it becomes the region's name. Defaults to
            ``'Please describe the region region{i} in the image in detail.'``.
        segmentation: For a mask in rollouts, validation and inference; ``{description}`` stands for
            what is to be found. Defaults to ``'Please segment {description} in this image.'``.
        referring: For a mask in the evaluation of referring segmentation. Defaults to the official
            evaluation's, which is the same behind a blank.
        lowercase: Whether the captions of training and validation data are in lower case where
            they are asked for, as in all official training of segmentation. Inference and the
            evaluation of referring segmentation send texts as they are, as officially. Defaults to
            True.

    Raises:
        ValueError: One has no place for what it asks about.
    """

    region: str = REGION_QUESTION
    segmentation: str = SEGMENTATION_QUESTION
    referring: str = REFCOCO_QUESTION
    lowercase: bool = True

    def __post_init__(self) -> None:
        check_region_question(self.region)
        check_segmentation_question(self.segmentation)
        check_segmentation_question(self.referring)

    def description(self, caption: str) -> str:
        """A caption of the data as training asks for it: no final ``.``, lower case."""
        description = strip_final_period(caption)
        return description.lower() if self.lowercase else description


def region_input(
    num_image_tokens: int, cells_per_region: Sequence[int], question: str = REGION_QUESTION
) -> str:
    """What the user says to ask for one description: image, list of regions, question.

    Args:
        num_image_tokens: ``<IMG_CONTEXT>`` tokens of the image, summed over its tiles.
        cells_per_region: See `region_list`.
        question: Holds ``region{i}``, which becomes ``region1``, or ``region1 and region2`` where
            one description speaks of several regions.

    Raises:
        ValueError: See `region_list` and `check_region_question`.
    """
    names = [f'region{i}' for i in range(1, len(cells_per_region) + 1)]
    *most, last = names or ['']
    asked = check_region_question(question).replace(
        REGION, f'{", ".join(most)} and {last}' if most else last
    )
    return f'{image_text(num_image_tokens)}{region_list(cells_per_region)}\n{asked}'


def region_turns(
    num_image_tokens: int,
    cells_per_region: Sequence[int],
    questions: Sequence[str],
    captions: Sequence[str],
) -> list[tuple[str, str]]:
    """Turns that describe the regions of an image one by one, for `encode_turns`.

    The image and the list of regions stand in the first turn only; turn i asks for region i.

    Args:
        num_image_tokens: ``<IMG_CONTEXT>`` tokens of the image, summed over its tiles.
        cells_per_region: See `region_list`.
        questions: One a region, with ``region{i}``.
        captions: One a region; ``<`` and ``>`` are deleted.

    Raises:
        ValueError: See `region_list` and `check_region_question`; or their numbers differ.
    """
    counts = (len(cells_per_region), len(questions), len(captions))
    if len(set(counts)) > 1:
        raise ValueError(
            f'{counts[0]} regions, {counts[1]} questions and {counts[2]} captions: every region '
            'needs one of each'
        )
    start = f'{image_text(num_image_tokens)}{region_list(cells_per_region)}\n'
    turns = []
    for i, (question, caption) in enumerate(zip(questions, captions, strict=True), 1):
        asked = check_region_question(question).replace(REGION, f'region{i}')
        turns.append((f'{start if i == 1 else ""}{asked}', without_brackets(caption)))
    return turns


def segmentation_input(
    num_image_tokens: int, description: str, question: str = SEGMENTATION_QUESTION
) -> str:
    """What the user says to ask for the mask of what ``description`` describes.

    Args:
        num_image_tokens: ``<IMG_CONTEXT>`` tokens of the image, summed over its tiles.
        description: Noun phrase, may be empty; see :func:`strip_final_period`.
        question: Holds ``{description}``.

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
    asked = check_segmentation_question(question).replace(DESCRIPTION, description)
    return f'{image_text(num_image_tokens)}{asked}'


#: As the official evaluation of video benchmarks asks.
CLIP_QUESTION = 'Please segment {description}.'
CLIP_REASONING_QUESTION = ' {description} Please respond with a segmentation mask.'


def clip_input(num_frames: int, num_image_tokens: int, description: str) -> str:
    """What the user says to ask for an object's masks in a clip, as the official evaluation.

    Args:
        num_frames: Frames that the language model sees, each as an image without tiles.
        num_image_tokens: ``<IMG_CONTEXT>`` tokens of a frame.
        description: Noun phrase; or a question, told by its ``?``, which is asked as it is.

    Raises:
        ValueError: As `segmentation_input`, or there is no frame.
    """
    if num_frames < 1:
        raise ValueError(f'a clip needs at least one frame, got {num_frames}')
    question = CLIP_REASONING_QUESTION if '?' in description else CLIP_QUESTION
    before = image_text(num_image_tokens) * (num_frames - 1)
    return before + segmentation_input(num_image_tokens, description, question)


def clip_region_input(
    num_frames: int,
    num_image_tokens: int,
    cells_per_region: Sequence[int],
    question: str = REGION_QUESTION,
) -> str:
    """What the user says to ask for one description of regions of a clip: frames, list, question.

    Args:
        num_frames: Frames that the language model sees, each as an image without tiles.
        num_image_tokens: ``<IMG_CONTEXT>`` tokens of a frame.
        cells_per_region: See `region_list`.
        question: See `region_input`.

    Raises:
        ValueError: As `region_input`, or there is no frame.
    """
    if num_frames < 1:
        raise ValueError(f'a clip needs at least one frame, got {num_frames}')
    before = image_text(num_image_tokens) * (num_frames - 1)
    return before + region_input(num_image_tokens, cells_per_region, question)


def draw_question(questions: Sequence[str], name: str, iteration: int) -> str:
    """One of the questions, by chance.

    The name of the sample and the iteration decide, so that it is the same on any number of ranks
    and after a resume.

    Args:
        questions: At least one.
        name: Of the sample.
        iteration: Of the run.
    """
    return random.Random(f'{iteration} {name}').choice(questions)


def clean_caption(text: str) -> str:
    """What a text says: up to the first stop text of any template, without markers, on one line.

    Special tokens and chat markers (``<|...|>``) become spaces, runs of whitespace one space.
    """
    text = cut_at_stop(text, ALL_STOP_STRINGS)
    text = SPECIAL_PATTERN.sub(' ', text)
    text = _CHAT_MARKER_PATTERN.sub(' ', text)
    return ' '.join(text.split())


def without_brackets(text: str) -> str:
    """A caption to be learnt: ``<`` and ``>`` are deleted, as in the official region data."""
    return text.replace('<', '').replace('>', '')


def strip_final_period(caption: str) -> str:
    """A cleaned caption as it stands inside a segmentation question: without its final ``.``."""
    return caption.rstrip().rstrip('.').rstrip()
