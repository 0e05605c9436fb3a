"""The texts of a record as they may stand in a prompt: without markup, and not too long."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

from projects.llava_sam2_rl.prompts import (
    cut_at_sentence,
    estimate_tokens,
    neutralize,
    neutralize_name,
)
from projects.llava_sam2_rl.structures import RegionSample

#: Kinds of change besides those of `prompts.MARKUP`.
CUT_TEXT, CUT_CONVERSATION = 'cut_text', 'cut_conversation'
#: Turns of a conversation may have so many times ``max_caption_tokens`` together.
CONVERSATION_FACTOR = 4


class UnusableText(ValueError):
    """A text without which its record means nothing.

    Args:
        reason: Key that bad records are counted by.
        detail: What is wrong.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f'{reason}: {detail}')
        self.reason = reason
        self.detail = detail


def plain_sample(
    sample: RegionSample, max_caption_tokens: int | None
) -> tuple[RegionSample, Counter[str]]:
    """A record whose texts are words alone.

    Args:
        sample: As its source read it.
        max_caption_tokens: Bound of each text, as `prompts.estimate_tokens` counts, and a quarter
            of that of a conversation. ``None``: no bound.

    Returns:
        The record, and what was changed by kind: the kinds of `prompts.MARKUP`, ``cut_text``,
        ``cut_conversation``. A caption of which nothing is left becomes ``None``.

    Raises:
        UnusableText: ``long_caption``, where not even the first sentence fits; ``empty_turn`` or
            ``empty_caption``, where nothing is left of a text that is all there is.
    """
    changed: Counter[str] = Counter()

    def plain(text: str | None) -> str | None:
        if not text:
            return text
        text, kinds = plain_text(text, max_caption_tokens)
        changed.update(kinds)
        return text or None

    def name(text: str) -> str:
        text, kinds = neutralize_name(text)
        changed.update(kinds)
        return text

    made = dataclasses.replace(
        sample,
        caption=plain(sample.caption),
        region_captions=tuple(plain(text) for text in sample.region_captions),
        conversation=_conversation(sample.conversation, plain, max_caption_tokens, changed),
        # Nothing is learnt from these: what is too long is left out.
        category=_or_none(plain, sample.category),
        distractor=_or_none(plain, sample.distractor),
        sample_id=name(sample.sample_id),
    )
    if sample.texts and not made.texts and not made.num_regions:
        raise UnusableText('empty_caption', f'nothing but markup: {sample.texts[0][:40]!r}')
    return made, +changed


def plain_text(text: str, max_tokens: int | None) -> tuple[str, Counter[str]]:
    """A text that is words alone, and what was changed in it by kind; see `plain_sample`.

    Raises:
        UnusableText: ``long_caption``.
    """
    text, kinds = neutralize(text)
    changed = Counter(kinds)
    if max_tokens is not None:
        cut = cut_at_sentence(text, max_tokens)
        if cut is None:
            raise UnusableText(
                'long_caption',
                f'a text of about {estimate_tokens(text)} tokens, whose first sentence is '
                f'longer than max_caption_tokens={max_tokens}: {text[:40]!r}…',
            )
        changed[CUT_TEXT] += cut != text
        text = cut
    return text, +changed


def _or_none(plain: Callable[[str | None], str | None], text: str | None) -> str | None:
    try:
        return plain(text)
    except UnusableText:
        return None


def _conversation(
    turns: tuple[tuple[str, str], ...],
    plain: Callable[[str | None], str | None],
    max_caption_tokens: int | None,
    changed: Counter[str],
) -> tuple[tuple[str, str], ...]:
    made: list[tuple[str, str]] = []
    left = (max_caption_tokens or 0) * CONVERSATION_FACTOR
    for question, answer in turns:
        said = plain(question), plain(answer)
        if not said[0] or not said[1]:
            raise UnusableText('empty_turn', f'{question[:40]!r}, {answer[:40]!r}')
        left -= estimate_tokens(said[0]) + estimate_tokens(said[1])
        # The first turn always fits.
        if max_caption_tokens is not None and left < 0:
            changed[CUT_CONVERSATION] += 1
            break
        made.append((said[0], said[1]))
    return tuple(made)
