"""Pictures for people: masks over images, and pages of cards that say why one of them won.

Pages are put together by Pillow from boxes whose text is measured before it is drawn, so nothing
overlaps however long a caption is, and a page takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont

#: The true region; what was found.
REGION, FOUND = '#ffd400', '#00c8ff'

#: Side of the box of a picture, and space around things, in pixels.
CELL, GAP, PADDING = 184, 10, 6
_TEXT, _SMALL, _TITLE = 12, 11, 15
_INK, _FAINT, _PAPER, _CARD = '#1b1b1b', '#6b6b6b', '#ffffff', '#f3f3f3'
_BAR, _GROOVE = '#5b8def', '#dcdcdc'
_GOOD, _BAD, _NEUTRAL = (27, 125, 50), (190, 35, 35), (125, 125, 125)
#: Longest paragraph; what is cut off ends in an ellipsis.
_MAX_LINES = 9
_BOLD_SCORES = ('reward',)


def overlay(
    image: np.ndarray, mask: np.ndarray, colour: str, fill: float = 0.45, outline: int | None = None
) -> np.ndarray:
    """An image with a mask over it.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        mask: ``(H, W)`` bool, or ``(R, H, W)``, of which the union is drawn.
        colour: As matplotlib names it.
        fill: Opacity inside the mask; 0 leaves only the outline.
        outline: Width of the mask's border in pixels; ``None``: as the image is large.

    Returns:
        A new ``(H, W, 3)`` uint8.

    Raises:
        ValueError: Image and mask differ in size.
    """
    mask = mask if mask.ndim == 2 else mask.any(0)
    if mask.shape != image.shape[:2]:
        raise ValueError(f'mask is {mask.shape}, image {image.shape[:2]}')
    rgb = np.array(to_rgb(colour)) * 255
    drawn = image.copy()
    drawn[mask] = np.rint((1 - fill) * image[mask] + fill * rgb).astype(np.uint8)
    width = max(1, round(max(mask.shape) / 120)) if outline is None else outline
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, contours, -1, rgb.tolist(), width)
    return drawn


def faded(image: np.ndarray, colour: float = 0.3) -> np.ndarray:
    """``(H, W, 3)`` uint8 with only a share of its colour left, as a background."""
    grey = image.mean(axis=2, keepdims=True)
    return np.rint(grey + colour * (image - grey)).astype(np.uint8)


def fit(height: int, width: int, box: int = CELL) -> tuple[int, int]:
    """Rows and columns of the largest picture of these proportions in a square box."""
    scale = box / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``(h, w, 3)`` uint8 -> rows and columns ``size``."""
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS)
    return np.array(resized)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``(h, w)`` bool -> rows and columns ``size``; a region that is there stays visible."""
    share = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
    half = share >= 0.5
    return half if half.any() else share > 0


@dataclass(frozen=True)
class Card:
    """A picture with what there is to say about it.

    Args:
        picture: ``(h, w, 3)`` uint8, at most `CELL` pixels wide.
        caption: A paragraph.
        note: A paragraph in small faint letters.
        heading: In the bar on top, left; the bar is left out where there is no heading.
        advantage: In the bar, right; it colours the bar green or red.
        scores: Names and values, ``None`` = unscorable; drawn with a bar from 0 to 1.
    """

    picture: np.ndarray
    caption: str = ''
    note: str = ''
    heading: str = ''
    advantage: float | None = None
    scores: Sequence[tuple[str, float | None]] = ()


@dataclass(frozen=True)
class Row:
    """A question and its answers, side by side.

    Args:
        title: One line over the row.
        question: The card on the left.
        answers: Cards to the right of it, at most `ANSWERS_PER_LINE` in a line.
    """

    title: str
    question: Card
    answers: Sequence[Card]


@dataclass(frozen=True)
class Section:
    """Rows under a heading with an explanation."""

    title: str
    explanation: str
    rows: Sequence[Row] = field(default_factory=list)


ANSWERS_PER_LINE = 8


def draw_page(sections: Sequence[Section]) -> np.ndarray:
    """All sections below each other, ``(H, W, 3)`` uint8."""
    columns = 1 + max(
        (min(len(row.answers), ANSWERS_PER_LINE) for s in sections for row in s.rows), default=3
    )
    width = columns * (_CARD_WIDTH + GAP) + GAP
    blocks = [block for section in sections for block in _section(section, width)]
    page = Image.new('RGB', (width, sum(block.height for block in blocks) + GAP), _PAPER)
    top = 0
    for block in blocks:
        page.paste(block, (0, top))
        top += block.height
    return np.array(page)


_CARD_WIDTH = CELL + 2 * PADDING


def _section(section: Section, width: int) -> Iterator[Image.Image]:
    yield _lines(section.title, width, _font(_TITLE, bold=True), _INK, top=2 * GAP)
    yield _lines(section.explanation, width, _font(_TEXT), _FAINT, top=2)
    for row in section.rows:
        yield _lines(row.title, width, _font(_TEXT, bold=True), _INK, top=GAP)
        yield _row(row, width)


def _lines(
    text: str, width: int, font: ImageFont.FreeTypeFont, colour: str, top: int
) -> Image.Image:
    wrapped = wrap(text, font, width - 2 * GAP)
    step = _step(font)
    block = Image.new('RGB', (width, top + step * len(wrapped) + 2), _PAPER)
    draw = ImageDraw.Draw(block)
    for index, line in enumerate(wrapped):
        draw.text((GAP, top + index * step), line, font=font, fill=colour)
    return block


def _row(row: Row, width: int) -> Image.Image:
    lines = [
        row.answers[start : start + ANSWERS_PER_LINE]
        for start in range(0, len(row.answers), ANSWERS_PER_LINE)
    ] or [[]]
    heights = [max(map(_card_height, (row.question, *lines[0])))]
    heights += [max(map(_card_height, line)) for line in lines[1:]]
    block = Image.new('RGB', (width, sum(heights) + GAP * len(heights)), _PAPER)
    top = GAP // 2
    for index, (line, height) in enumerate(zip(lines, heights, strict=True)):
        if index == 0:
            block.paste(_card(row.question, height), (GAP, top))
        for column, card in enumerate(line, start=1):
            block.paste(_card(card, height), (GAP + column * (_CARD_WIDTH + GAP), top))
        top += height + GAP
    return block


def _card_height(card: Card) -> int:
    return _compose(card, None)


def _card(card: Card, height: int) -> Image.Image:
    block = Image.new('RGB', (_CARD_WIDTH, height), _CARD)
    _compose(card, block)
    return block


def _compose(card: Card, block: Image.Image | None) -> int:
    """Draws a card, or where there is nothing to draw on only measures it; returns its height."""
    draw = None if block is None else ImageDraw.Draw(block)
    top = 0
    if card.heading or card.advantage is not None:
        font = _font(_TEXT, bold=True)
        bar = _step(font) + 6
        if draw is not None:
            draw.rectangle((0, 0, _CARD_WIDTH, bar - 1), fill=_advantage_colour(card.advantage))
            draw.text((PADDING, 3), card.heading, font=font, fill='white')
            if card.advantage is not None:
                text = f'A {card.advantage:+.2f}'
                draw.text((_CARD_WIDTH - PADDING, 3), text, font=font, fill='white', anchor='ra')
        top += bar
    top += PADDING
    if block is not None:
        left = PADDING + (CELL - card.picture.shape[1]) // 2
        block.paste(Image.fromarray(card.picture), (left, top))
    top += card.picture.shape[0] + PADDING
    for text, font, colour in (
        (card.caption, _font(_TEXT), _INK),
        (card.note, _font(_SMALL), _FAINT),
    ):
        lines = wrap(text, font, CELL, _MAX_LINES)
        for line in lines:
            if draw is not None:
                draw.text((PADDING, top), line, font=font, fill=colour)
            top += _step(font)
        top += 4 if lines else 0
    for name, value in card.scores:
        top = _score(draw, top, name, value)
    return top + PADDING


def _score(draw: ImageDraw.ImageDraw | None, top: int, name: str, value: float | None) -> int:
    font = _font(_SMALL, bold=name in _BOLD_SCORES)
    step = _step(font)
    if draw is not None:
        right = '–' if value is None else f'{value:.3f}'
        room = CELL - int(font.getlength(right)) - 8
        draw.text((PADDING, top), wrap(name, font, room, 1)[0], font=font, fill=_INK)
        draw.text((PADDING + CELL, top), right, font=font, fill=_INK, anchor='ra')
        y = top + step
        draw.rectangle((PADDING, y, PADDING + CELL, y + 3), fill=_GROOVE)
        if value is not None and value > 0:
            end = PADDING + round(CELL * min(value, 1.0))
            draw.rectangle((PADDING, y, end, y + 3), fill=_BAR)
    return top + step + 8


def _advantage_colour(advantage: float | None) -> tuple[int, int, int]:
    """Green above, red below, grey at 0; full colour from 1 on."""
    value = 0.0 if advantage is None else advantage
    target = _GOOD if value > 0 else _BAD
    strength = 0.0 if value == 0 else 0.35 + 0.65 * min(abs(value), 1.0)
    red, green, blue = (
        round(n + strength * (t - n)) for n, t in zip(_NEUTRAL, target, strict=True)
    )
    return red, green, blue


def wrap(
    text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int | None = None
) -> list[str]:
    """Lines of ``text`` no wider than ``width`` pixels; words that are wider are cut.

    Args:
        text: Any text; white space is one space, what cannot be printed a question mark.
        font: It is measured in.
        width: In pixels.
        max_lines: The last of them ends in an ellipsis where more would be needed.
    """
    printable = ''.join(c if c.isprintable() else '�' for c in ' '.join(text.split()))
    lines: list[str] = []
    line = ''
    for word in printable.split():
        joined = f'{line} {word}' if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width:
            cut = max(n for n in range(1, len(word)) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    if line:
        lines.append(line)
    if max_lines is not None and len(lines) > max_lines:
        lines = lines[:max_lines]
        last = lines[-1]
        while last and font.getlength(last + '…') > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + '…'
    return lines


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    folder = Path(matplotlib.get_data_path()) / 'fonts/ttf'
    name = 'DejaVuSans-Bold.ttf' if bold else 'DejaVuSans.ttf'
    return ImageFont.truetype(folder / name, size)


def _step(font: ImageFont.FreeTypeFont) -> int:
    """Pixels from one line to the next."""
    ascent, descent = font.getmetrics()
    return ascent + descent + 1
