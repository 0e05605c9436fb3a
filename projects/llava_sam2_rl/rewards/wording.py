"""The words in which a judge of captions is asked, from a template file."""

from __future__ import annotations

import functools
import hashlib
import string
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from projects.llava_sam2_rl.rewards import dlc
from projects.llava_sam2_rl.utils.pretrained import resolve

if TYPE_CHECKING:
    import inflect

#: The words that are used where no file is named.
DEFAULT_TEMPLATE = 'llava_sam2_rl://assets/judge/wording.toml'
#: The judge of the published numbers below.
PUBLISHED_JUDGE = 'Llama-3.1-8B-Instruct'
#: DLC-Bench as published, ``(pos, neg, avg)``, of `PUBLISHED_JUDGE` asked in the official words.
PUBLISHED = {
    'DAM-3B': (0.510, 0.830, 0.670),
    'GAR-1B': (0.489, 0.870, 0.679),
    'GAR-8B': (0.502, 0.846, 0.674),
}
#: Fields of each template text.
_FIELDS = {
    'prompt': {'caption', 'question', 'choices'},
    'choice': {'letter', 'text'},
    'recognition_singular': {'class_name'},
    'recognition_plural': {'class_name'},
}


@dataclass(frozen=True)
class Wording:
    """A template file's content.

    Args:
        name: What results call it.
        prompt: The user message, with ``{caption}``, ``{question}`` and ``{choices}``.
        choice: One choice's line, with ``{letter}`` and ``{text}``.
        recognition_singular: The question whether it is the right kind of thing at all, with
            ``{class_name}`` and its article.
        recognition_plural: The same about several, ``{class_name}`` without article.
        yes: Answer to it that counts as recognised.
        no: The other one.
        official: Whether these are the official evaluation's words.
    """

    name: str
    prompt: str
    choice: str
    recognition_singular: str
    recognition_plural: str
    yes: str = 'Yes'
    no: str = 'No'
    official: bool = False

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change with any of the words."""
        words = [str(getattr(self, field.name)) for field in fields(self)]
        return hashlib.sha256('\0'.join(words).encode()).hexdigest()[:12]

    def question_prompt(self, caption: str, question: dlc.Question) -> str:
        """The one user message that puts ``question`` about ``caption`` to the judge."""
        choices = '\n'.join(
            self.choice.format(letter=letter, text=text)
            for letter, text in zip(string.ascii_uppercase, question.options, strict=False)
        )
        return self.prompt.format(caption=caption, question=question.text, choices=choices)

    def recognition_question(self, class_name: str) -> dlc.Question:
        """The question asked first: is it the right kind of thing at all?"""
        if is_plural(class_name):
            text = self.recognition_plural.format(class_name=class_name)
        else:
            text = self.recognition_singular.format(class_name=_inflect().a(class_name))
        return dlc.Question(text, ((self.yes, 1.0), (self.no, 0.0)), dlc.RECOGNITION)

    def comparison(self, model: str) -> str:
        """With which published numbers a score by this wording and this judge compares."""
        published = '; '.join(
            f'{name} {"/".join(f"{value:.3f}" for value in values)}'
            for name, values in PUBLISHED.items()
        )
        differences = []
        if not self.official:
            differences.append(f'wording {self.name!r} is not the official one')
        if PUBLISHED_JUDGE.casefold() not in model.casefold():
            differences.append(f'judge {model!r} is not {PUBLISHED_JUDGE}')
        if differences:
            return (
                f'with no published number ({", and ".join(differences)}): compare only scores of '
                'the same wording and judge'
            )
        return (
            f'with the published pos/neg/avg of {PUBLISHED_JUDGE} as text-only judge: {published}'
        )


def load_wording(template: str | Path | None = None) -> Wording:
    """The words of a template file.

    Args:
        template: A TOML file with the texts of `Wording`. Defaults to None, `DEFAULT_TEMPLATE`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no TOML, a text is missing or unknown, or lacks one of its fields.
    """
    path = resolve(template or DEFAULT_TEMPLATE)
    if not path.is_file():
        raise FileNotFoundError(
            f'there is no template {path}: copy {resolve(DEFAULT_TEMPLATE)} and change its words'
        )
    try:
        content = tomllib.loads(path.read_text(encoding='utf-8'))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is no TOML: {error}') from error
    names = {field.name for field in fields(Wording)}
    required = {'name', *_FIELDS}
    if not required <= set(content) <= names:
        raise ValueError(
            f'{path} has the texts {sorted(content)}: needed are {sorted(required)}, possible '
            f'{sorted(names)}'
        )
    for key, value in content.items():
        if not isinstance(value, bool if key == 'official' else str):
            raise ValueError(f'{path}: {key} is a {type(value).__name__}')
        if key in _FIELDS:
            _check_fields(path, key, str(value))
    return Wording(**content)


def _check_fields(path: Path, key: str, text: str) -> None:
    try:
        found = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ValueError(f'{path}: {key}: {error} (a brace of its own is written {{{{)') from error
    if found != _FIELDS[key]:
        raise ValueError(
            f'{path}: {key} has the fields {sorted(found)}, expected {sorted(_FIELDS[key])}'
        )


def is_plural(name: str) -> bool:
    """Whether a class name is a plural, as the official evaluation decides it.

    ``inflect`` takes every name that has a singular of its own for a plural; "bus" is excepted.
    """
    return name.strip().casefold() != 'bus' and _inflect().singular_noun(name) is not False


@functools.cache
def _inflect() -> inflect.engine:
    # Seconds of every start, and wanted where a judge is asked.
    import inflect

    return inflect.engine()
