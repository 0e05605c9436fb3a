"""Lists of photographs, and of questions about each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def pair_up(
    image: Any, asked: Any, what: str
) -> tuple[list[tuple[Any, Any]], Callable[[Sequence[Any]], Any]]:
    """Every question with its photograph, and what gives answers the shape of the questions.

    Args:
        image: A photograph, or a list of them.
        asked: A question, or a list of them; with a list of photographs one, or a list, for each.
        what: What the questions are, for the message.

    Raises:
        ValueError: The lists differ in length.
    """
    many = isinstance(image, list | tuple)
    images, entries = (list(image), asked) if many else ([image], [asked])
    if not isinstance(entries, list | tuple) or len(entries) != len(images):
        found = len(entries) if isinstance(entries, list | tuple) else 'no list of'
        raise ValueError(f'{len(images)} photographs, but {found} {what}: give an entry for each')
    jobs = [
        (one, question)
        for one, entry in zip(images, entries, strict=True)
        for question in (entry if isinstance(entry, list | tuple) else [entry])
    ]

    def like(answers: Sequence[Any]) -> Any:
        rest = iter(answers)
        shaped = [
            [next(rest) for _ in entry] if isinstance(entry, list | tuple) else next(rest)
            for entry in entries
        ]
        return shaped if many else shaped[0]

    return jobs, like
