"""The texts of records, and which of a record's masks each speaks of.

Records bring their text in two forms: ``caption``, one string, or ``conversations``, a list of
turns ``{'from': 'human' | 'gpt', 'value': str}``, whose ``gpt`` turns are the descriptions. A text
may hold two kinds of placeholder:

- ``<image>`` marks where the picture goes in a chat. It says nothing and is taken out.
- ``<PromptN>`` stands for mask N of the record, counted from 0. It becomes ``region1``,
  ``region2``, ...: what :func:`~projects.llava_sam2_rl.prompts.region_list` calls the
  regions that the model is given, which are those that the text names, in the order of the masks.
  As a label in front of a text about one region (``<Prompt0>: a cup``) it is taken out.

Which masks a text speaks of:

1. Those that it names. Where the answer names none but its question does, those.
2. Where no placeholder is there and there are as many answers as masks, or more, answer i speaks
   of mask i.
3. Otherwise all masks together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import BadRecord

_IMAGE = re.compile(r'<image>', re.IGNORECASE)
_PROMPT = re.compile(r'<Prompt(\d+)>', re.IGNORECASE)
_LABEL = re.compile(r'^\s*<Prompt\d+>\s*:\s*', re.IGNORECASE)


@dataclass(frozen=True)
class RegionText:
    """A description and what it describes.

    Args:
        regions: Indices of the masks that the caption speaks of, ascending, at least one.
        caption: The description, or ``None`` where the record has none.
    """

    regions: tuple[int, ...]
    caption: str | None


def region_texts(record: Mapping[str, Any], num_masks: int, name: str) -> list[RegionText]:
    """What a record says about its masks: the texts of which one is drawn each time.

    More than one only in the second case above. ``caption`` is used where it is there,
    ``conversations`` otherwise, the first answer of it but in that case.

    Args:
        record: Holds ``caption``, ``conversations``, both, or neither (or ``None`` in them).
        num_masks: Masks of the record, at least 1.
        name: Of the record, for messages.

    Raises:
        BadRecord: ``bad_caption``, where the fields are not as above, or ``bad_prompt_index``,
            where a text names a mask that the record has not.
    """
    turns = _turns(record, name)
    if not turns:
        return [RegionText(tuple(range(num_masks)), None)]
    unnamed = not any(_PROMPT.search(text) for turn in turns for text in turn)
    if unnamed and 1 < num_masks <= len(turns):
        return [
            RegionText((i,), _plain(answer, (i,)))
            for i, (_, answer) in enumerate(turns[:num_masks])
        ]
    question, answer = turns[0]
    regions = _named(answer, num_masks, name) or _named(question, num_masks, name)
    regions = regions or tuple(range(num_masks))
    return [RegionText(regions, _plain(answer, regions))]


def draw_text(
    texts: Sequence[RegionText], rng: np.random.Generator
) -> tuple[RegionText, str | None]:
    """One of the texts, and another one's caption as distractor where there is one."""
    at = int(rng.integers(len(texts)))
    others = [text.caption for i, text in enumerate(texts) if i != at and text.caption]
    return texts[at], others[int(rng.integers(len(others)))] if others else None


def category_name(value: Any) -> str | None:
    """The class of a record: a string, or a list of strings of which the first counts."""
    if isinstance(value, (list, tuple)):
        value = next((item for item in value if item), None)
    return ' '.join(value.split()) or None if isinstance(value, str) else None


def _turns(record: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """Question and answer of every round."""
    caption = record.get('caption')
    if caption is not None:
        if not isinstance(caption, str):
            raise BadRecord('bad_caption', name, f'caption is a {type(caption).__name__}')
        return [('', caption)]
    conversations = record.get('conversations')
    if conversations is None:
        return []
    if not isinstance(conversations, (list, tuple)):
        raise BadRecord(
            'bad_caption', name, f'conversations is a {type(conversations).__name__}, no list'
        )
    rounds, question = [], ''
    for turn in conversations:
        value = turn.get('value') if isinstance(turn, Mapping) else turn
        if not isinstance(turn, Mapping) or not isinstance(value, (str, type(None))):
            raise BadRecord('bad_caption', name, f'a turn of conversations is {turn!r:.80}')
        if turn.get('from') == 'gpt':
            rounds.append((question, value or ''))
            question = ''
        else:
            question = value or ''
    return rounds


def _named(text: str, num_masks: int, name: str) -> tuple[int, ...]:
    numbers = _PROMPT.findall(text)
    wrong = [number for number in numbers if len(number) > 6 or int(number) >= num_masks]
    if wrong:
        raise BadRecord(
            'bad_prompt_index', name, f'<Prompt{wrong[0][:12]}> of {num_masks} masks, from 0'
        )
    return tuple(sorted({int(number) for number in numbers}))


def _plain(text: str, regions: Sequence[int]) -> str:
    text = _IMAGE.sub(' ', text)
    if len(regions) == 1:
        text = _LABEL.sub('', text)
    position = {region: i for i, region in enumerate(regions, 1)}
    text = _PROMPT.sub(lambda match: f'region{position[int(match.group(1))]}', text)
    return ' '.join(text.split())
