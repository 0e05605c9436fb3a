"""Multiple-choice judging of captions by text alone, after the describe-anything evaluation.

Pure functions: what is asked, how an answer is read, what it scores (Lian et al. 2025, DLC-Bench).
The judge that answers is somebody else's business (``chat.py``), and so are the words in which it
is asked (``wording.py``).
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POSITIVE, NEGATIVE, RECOGNITION = 'positive', 'negative', 'recognition'


@dataclass(frozen=True)
class Question:
    """One multiple-choice question about a caption.

    Args:
        text: The question.
        choices: ``(text, score)`` pairs, scores in [-1, 1].
        kind: ``'positive'`` (is what is there described?), ``'negative'`` (is something described
            that is not there?) or ``'recognition'``.
    """

    text: str
    choices: tuple[tuple[str, float], ...]
    kind: str

    @property
    def options(self) -> list[str]:
        """The choices' texts."""
        return [text for text, _ in self.choices]


@dataclass(frozen=True)
class RegionScore:
    """Mean scores of one region; ``None`` where it has no question of that kind."""

    positive: float | None
    negative: float | None

    @property
    def reward(self) -> float:
        """Mean of the two (of those there are), clamped to [0, 1]."""
        parts = [part for part in (self.positive, self.negative) if part is not None]
        if not parts:
            raise ValueError('a region without questions has no score')
        return min(1.0, max(0.0, sum(parts) / len(parts)))


def parse_questions(items: Any, where: str) -> tuple[Question, ...]:
    """Questions of one region from their JSON form.

    Args:
        items: ``[{question, choices: [[text, score], ...], type}, ...]``; other keys are ignored.
        where: Names the region or file in errors.

    Raises:
        ValueError: Something is missing, a score lies outside [-1, 1], or two choices are equal.
    """
    if not isinstance(items, list):
        raise ValueError(f'{where}: expected a list of questions, got {type(items).__name__}')
    return tuple(
        _parse_question(item, f'{where}, question {number}')
        for number, item in enumerate(items, start=1)
    )


def _parse_question(item: Any, where: str) -> Question:
    try:
        text, kind = item['question'], item['type']
        choices = tuple((choice, float(score)) for choice, score in item['choices'])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{where}: expected {{question, choices: [[text, score], ...], type}}, '
            f'got {str(item)[:200]}'
        ) from error
    if kind not in (POSITIVE, NEGATIVE):
        raise ValueError(f'{where}: type {kind!r} is neither {POSITIVE!r} nor {NEGATIVE!r}')
    if not isinstance(text, str) or not all(isinstance(c, str) and c.strip() for c, _ in choices):
        raise ValueError(f'{where}: the question and every choice must be text')
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise ValueError(f'{where}: {len(choices)} choices, expected 2 to 26')
    if len({_normal(choice) for choice, _ in choices}) != len(choices):
        raise ValueError(f'{where}: two choices read the same: {[c for c, _ in choices]}')
    if not all(-1 <= score <= 1 for _, score in choices):
        raise ValueError(f'{where}: a score lies outside [-1, 1]: {choices}')
    return Question(text, choices, kind)


def load_question_file(path: str | Path) -> dict[str, tuple[Question, ...]]:
    """Reads ``{annotation_id: [question, ...]}`` (DLC-Bench's ``qa.json``).

    Raises:
        ValueError: As :func:`parse_questions`, with file and annotation named.
    """
    content = json.loads(Path(path).read_text(encoding='utf-8'))
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected an object by annotation id')
    return {key: parse_questions(items, f'{path}: {key}') for key, items in content.items()}


def shuffled(question: Question, seed: int) -> Question:
    """The question with its choices in an order fixed by ``seed`` and its text."""
    choices = list(question.choices)
    random.Random(f'{seed}:{question.text}').shuffle(choices)
    return Question(question.text, tuple(choices), question.kind)


def parse_choice(answer: str, options: Sequence[str]) -> int | None:
    """Which option an answer means.

    In this order: the answer is exactly an option, its letter, or both ("B. red"); exactly one
    option occurs in it as whole words; it begins with a letter that stands for an option ("B) it
    is"); several options occur: the one that ends last, the longest of those.

    Args:
        answer: What the judge said.
        options: The lettered choices' texts in the order they were shown.

    Returns:
        Index of the option, or ``None`` where the answer means none.
    """
    said = _normal(answer)
    normal = [_normal(option) for option in options]
    letters = string.ascii_lowercase[: len(options)]
    for index, (letter, option) in enumerate(zip(letters, normal, strict=True)):
        if said == option or re.fullmatch(
            rf'\(?{letter}[).:]*|\(?{letter}[).:]+\s*{re.escape(option)}', said
        ):
            return index
    ends: dict[int, tuple[int, int]] = {}
    for index, option in enumerate(normal):
        for match in re.finditer(rf'(?<!\w){re.escape(option)}(?!\w)', said):
            ends[index] = (match.end(), len(option))
    if len(ends) == 1:
        return next(iter(ends))
    # A bare "A" before a space is an article more often than an answer.
    leading = re.match(r'\s*\(?(?:([A-Za-z])[).:]|([A-Z])(?:,|\s*\n|(?<!A)(?<!I)\s))', answer)
    if leading:
        letter = (leading[1] or leading[2]).lower()
        if letter in letters:
            return letters.index(letter)
    return max(ends, key=lambda index: ends[index]) if ends else None


def _normal(text: str) -> str:
    """Case, outer white space, quotes, emphasis and a closing full stop make no difference."""
    return re.sub(r'\s+', ' ', text).strip(' "\'`*.').casefold()


def question_score(question: Question, choice: int | None, recognised: bool) -> float:
    """Score of one answer: unreadable counts 0, an unrecognised object never more than 0.

    Args:
        question: As it was shown (shuffled).
        choice: From :func:`parse_choice`.
        recognised: Whether the recognition question was answered with yes.
    """
    score = 0.0 if choice is None else question.choices[choice][1]
    return score if recognised else min(0.0, score)


def region_score(
    questions: Sequence[Question], choices: Sequence[int | None], recognised: bool
) -> RegionScore:
    """Mean positive and mean negative score of one region's answers."""
    means: dict[str, float | None] = {}
    for kind in (POSITIVE, NEGATIVE):
        scores = [
            question_score(question, choice, recognised)
            for question, choice in zip(questions, choices, strict=True)
            if question.kind == kind
        ]
        means[kind] = sum(scores) / len(scores) if scores else None
    return RegionScore(means[POSITIVE], means[NEGATIVE])


def benchmark_score(regions: Sequence[RegionScore]) -> dict[str, float]:
    """``pos`` and ``neg``: means over the regions that have such questions; ``avg`` of the two.

    Raises:
        ValueError: No region has a positive, or none a negative question.
    """
    positive = [region.positive for region in regions if region.positive is not None]
    negative = [region.negative for region in regions if region.negative is not None]
    if not positive or not negative:
        raise ValueError(
            f'{len(positive)} regions with positive and {len(negative)} with negative questions: '
            'the score needs both'
        )
    pos, neg = sum(positive) / len(positive), sum(negative) / len(negative)
    return {'pos': pos, 'neg': neg, 'avg': (pos + neg) / 2}
