"""What a caption names rightly and wrongly of an object whose attributes are known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from projects.llava_sam2_rl.datasets import collages, scenes

#: Values by attribute, in the words of the captions of the sources that know attributes. Their
#: captions have no synonyms, and none are accepted: who trains on them learns these words.
VOCABULARY: dict[str, tuple[str, ...]] = {**scenes.VALUES, **collages.VALUES}


@dataclass(frozen=True)
class NamedAttribute:
    """One attribute of a caption.

    Args:
        right: Whether the true value is named.
        num_wrong: How many other values are named.
    """

    right: bool
    num_wrong: int


def named_values(caption: str, values: Sequence[str]) -> list[str]:
    """The values that a caption names, in its order, each once.

    Words are compared whole and without case. Of values that begin at the same word the longest
    counts, and its words count for no other: ``top center`` names no ``center``.
    """
    words = re.findall(r'[^\W_]+', caption.lower())
    phrases = sorted(((value.lower().split(), value) for value in values), key=lambda x: -len(x[0]))
    found: dict[str, None] = {}
    first = 0
    while first < len(words):
        for phrase, value in phrases:
            if words[first : first + len(phrase)] == phrase:
                found[value] = None
                first += len(phrase)
                break
        else:
            first += 1
    return list(found)


def compare_attributes(caption: str, attributes: Mapping[str, str]) -> dict[str, NamedAttribute]:
    """What a caption names of each attribute of its object.

    An attribute that is left out is neither right nor wrong; one that is named twice, with the true
    value and another, is both.

    Args:
        caption: Any text.
        attributes: True values by attribute.

    Raises:
        ValueError: `VOCABULARY` has no such attribute or value: captions could not name it.
    """
    for key, value in attributes.items():
        if value not in VOCABULARY.get(key, ()):
            raise ValueError(
                f'{key}={value!r} is not in the vocabulary of captions '
                f'({", ".join(VOCABULARY.get(key, VOCABULARY))}): add it to VOCABULARY of '
                'evaluation/attributes.py'
            )
    named = {key: named_values(caption, VOCABULARY[key]) for key in attributes}
    return {
        key: NamedAttribute(value in named[key], len(set(named[key]) - {value}))
        for key, value in attributes.items()
    }
