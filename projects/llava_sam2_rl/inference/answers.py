"""What a model's answer to a segmentation question says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from projects.llava_sam2_rl.models.free_generation import SegmentationAnswer
from projects.llava_sam2_rl.prompts import clean_caption, cut_at_stop

#: A mask marker of an answer, with the phrase that it is the mask of where one stands before it.
_PHRASE = re.compile(r'(?:<p>(?P<phrase>(?:(?!</?p>).)*)</p>\s*)?\[SEG\]', re.DOTALL)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What was found for a text.

    Args:
        mask: ``(H, W)`` bool, at the size of the photograph as it is shown: all objects of the
            answer together; empty where the model pointed at nothing.
        answer: What the model said, through its last word: a ``[SEG]`` for each object.
        found: Whether the mask has a pixel.
        masks: ``(P, H, W)`` bool: each object of the answer by itself; P may be 0.
        phrases: P phrases that the model named the objects by (``<p> a cup </p> [SEG]``), ``None``
            where it named none.
    """

    mask: np.ndarray
    answer: str
    found: bool
    masks: np.ndarray
    phrases: tuple[str | None, ...]


def read_answer(answer: SegmentationAnswer, stop_strings: Sequence[str]) -> Segmentation:
    """The answer as a user reads it.

    Args:
        answer: As it was generated.
        stop_strings: Texts that end an answer and are no part of it.
    """
    said = cut_at_stop(answer.text, stop_strings).strip()
    phrases = [match['phrase'] for match in _PHRASE.finditer(said)]
    if len(phrases) != answer.num_seg:  # a marker that was spelled, not pointed with
        phrases = [None] * answer.num_seg
    return Segmentation(
        mask=answer.mask.numpy(),
        answer=said,
        found=bool(answer.mask.any()),
        masks=answer.masks.numpy(),
        phrases=tuple(phrase and clean_caption(phrase) for phrase in phrases),
    )
