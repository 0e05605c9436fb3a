"""Pictures for people: masks over images, and pages of cards that say why one of them won.

Pages are put together by Pillow from boxes whose text is measured before it is drawn, so nothing
overlaps however long a caption is, and a page takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import draw_segmentation_masks, make_grid

#: The true region; what was found.
REGION, FOUND = '#ffd400', '#00c8ff'

#: Side of the box of a picture, and space around things, in pixels.
CELL, GAP, PADDING = 184, 10, 6
#: Most frames of a film strip, and the black around each in pixels.
MAX_FRAMES, _FILM = 9, 2
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
        colour: A name or ``#rrggbb``.
        fill: Opacity inside the mask; 0 leaves only the outline.
        outline: Width of the mask's border in pixels; ``None``: as the image is large.

    Returns:
        A new ``(H, W, 3)`` uint8.

    Raises:
        ValueError: Image and mask differ in size.
    """
    mask = mask if mask.ndim == 2 else np.any(mask, axis=0)
    if mask.shape != image.shape[:2]:
        raise ValueError(f'mask is {mask.shape}, image {image.shape[:2]}')
    # As floats: of bytes, torchvision cuts off the fraction, outside of the mask too.
    pixels = torch.tensor(image).permute(2, 0, 1) / 255
    filled = draw_segmentation_masks(pixels, torch.tensor(mask), alpha=fill, colors=colour)
    drawn = (255 * filled).round().byte().permute(1, 2, 0).contiguous().numpy()
    width = max(1, round(max(mask.shape) / 120)) if outline is None else outline
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, contours, -1, ImageColor.getrgb(colour), width)
    return drawn


def faded(image: np.ndarray, colour: float = 0.3) -> np.ndarray:
    """``(H, W, 3)`` uint8 with only a share of its colour left, as a background."""
    grey = image.mean(axis=2, keepdims=True)
    return np.rint(grey + colour * (image - grey)).astype(np.uint8)


def found_over_truth(image: np.ndarray, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A mask that was found, and the outline of the true one, on an image nearly without colour."""
    drawn = overlay(faded(image), found, FOUND, fill=0.6, outline=1)
    return overlay(drawn, truth, REGION, fill=0.0)


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


def film_strip(pictures: Sequence[np.ndarray], width: int = CELL) -> np.ndarray:
    """Frames of a clip side by side on black, two in a line, three where there are more than four.

    Args:
        pictures: T × ``(h, w, 3)`` uint8, all of one size, in order. Of more than `MAX_FRAMES`
            as many are shown, spread evenly, the first and the last among them.
        width: Of the strip in pixels.

    Returns:
        ``(H, width, 3)`` uint8.
    """
    if len(pictures) > MAX_FRAMES:
        chosen = np.linspace(0, len(pictures) - 1, MAX_FRAMES).round().astype(int)
        pictures = [pictures[t] for t in chosen]
    columns = min(len(pictures), 2 if len(pictures) <= 4 else 3)
    side = (width - (columns + 1) * _FILM) // columns
    height = max(1, round(pictures[0].shape[0] * side / pictures[0].shape[1]))
    lines = -(-len(pictures) // columns)
    strip = np.zeros((lines * (height + _FILM) + _FILM, width, 3), np.uint8)
    for t, picture in enumerate(pictures):
        line, column = divmod(t, columns)
        top, left = _FILM + line * (height + _FILM), _FILM + column * (side + _FILM)
        strip[top : top + height, left : left + side] = resize_image(picture, (height, side))
    return strip


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
    return np.array(_stack(blocks, width, _PAPER))


_CARD_WIDTH = CELL + 2 * PADDING


def _section(section: Section, width: int) -> Iterator[Image.Image]:
    line = partial(_paragraph, width=width, paper=_PAPER, left=GAP)
    yield line(section.title, _font(_TITLE, bold=True), _INK, above=2 * GAP)
    yield line(section.explanation, _font(_TEXT), _FAINT, above=2)
    for row in section.rows:
        yield line(row.title, _font(_TEXT, bold=True), _INK, above=GAP)
        yield _row(row)


def _row(row: Row) -> Image.Image:
    cards = [_card(row.question), *map(_card, row.answers)]
    height = max(card.height for card in cards)
    cells = [_stack([card], _CARD_WIDTH, _CARD, height) for card in cards]
    # The column of the question is its own.
    for place in range(ANSWERS_PER_LINE + 1, len(cells), ANSWERS_PER_LINE + 1):
        cells.insert(place, Image.new('RGB', (_CARD_WIDTH, height), _PAPER))
    grid = make_grid(
        [pil_to_tensor(cell) for cell in cells],
        nrow=ANSWERS_PER_LINE + 1,
        padding=GAP,
        pad_value=255,
    )
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def _card(card: Card) -> Image.Image:
    text = partial(_paragraph, width=_CARD_WIDTH, paper=_CARD, left=PADDING, max_lines=_MAX_LINES)
    picture = Image.new('RGB', (_CARD_WIDTH, len(card.picture) + 2 * PADDING), _CARD)
    left = (_CARD_WIDTH - card.picture.shape[1]) // 2
    picture.paste(Image.fromarray(card.picture), (left, PADDING))
    blocks = [picture]
    if card.heading or card.advantage is not None:
        blocks.insert(0, _bar(card.heading, card.advantage))
    if card.caption:
        blocks.append(text(card.caption, _font(_TEXT), _INK))
    if card.note:
        blocks.append(text(card.note, _font(_SMALL), _FAINT))
    blocks += [_score(name, value) for name, value in card.scores]
    blocks.append(Image.new('RGB', (_CARD_WIDTH, PADDING), _CARD))
    return _stack(blocks, _CARD_WIDTH, _CARD)


def _stack(
    blocks: Sequence[Image.Image], width: int, paper: str, height: int | None = None
) -> Image.Image:
    """Blocks below each other, on paper as high as they are or as is said."""
    page = Image.new('RGB', (width, height or sum(block.height for block in blocks)), paper)
    top = 0
    for block in blocks:
        page.paste(block, (0, top))
        top += block.height
    return page


def _paragraph(
    text: str,
    font: ImageFont.FreeTypeFont,
    ink: str,
    *,
    width: int,
    paper: str,
    left: int,
    above: int = 0,
    max_lines: int | None = None,
) -> Image.Image:
    lines = wrap(text, font, width - 2 * left, max_lines)
    block = Image.new('RGB', (width, above + _step(font) * len(lines) + 4), paper)
    draw = ImageDraw.Draw(block)
    for index, line in enumerate(lines):
        draw.text((left, above + index * _step(font)), line, font=font, fill=ink)
    return block


def _bar(heading: str, advantage: float | None) -> Image.Image:
    font = _font(_TEXT, bold=True)
    block = Image.new('RGB', (_CARD_WIDTH, _step(font) + 6), _advantage_colour(advantage))
    draw = ImageDraw.Draw(block)
    draw.text((PADDING, 3), heading, font=font, fill='white')
    if advantage is not None:
        right = _CARD_WIDTH - PADDING
        draw.text((right, 3), f'A {advantage:+.2f}', font=font, fill='white', anchor='ra')
    return block


def _score(name: str, value: float | None) -> Image.Image:
    font = _font(_SMALL, bold=name in _BOLD_SCORES)
    y = _step(font)
    block = Image.new('RGB', (_CARD_WIDTH, y + 8), _CARD)
    draw = ImageDraw.Draw(block)
    right = '–' if value is None else f'{value:.3f}'
    room = CELL - int(font.getlength(right)) - 8
    draw.text((PADDING, 0), wrap(name, font, room, 1)[0], font=font, fill=_INK)
    draw.text((PADDING + CELL, 0), right, font=font, fill=_INK, anchor='ra')
    draw.rectangle((PADDING, y, PADDING + CELL, y + 3), fill=_GROOVE)
    if value is not None and value > 0:
        draw.rectangle((PADDING, y, PADDING + round(CELL * min(value, 1.0)), y + 3), fill=_BAR)
    return block


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
    lines = ['']
    for word in printable.split():
        if lines[-1] and font.getlength(f'{lines[-1]} {word}') <= width:
            lines[-1] += f' {word}'
            continue
        if lines[-1]:
            lines.append('')
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append('')
            lines[-1] += letter
    if max_lines is not None and len(lines) > max_lines:
        del lines[max_lines:]
        while lines[-1] and font.getlength(lines[-1] + '…') > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + '…'
    return lines if lines[-1] else []


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    from matplotlib import get_data_path

    folder = Path(get_data_path()) / 'fonts/ttf'
    name = 'DejaVuSans-Bold.ttf' if bold else 'DejaVuSans.ttf'
    return ImageFont.truetype(folder / name, size)


def _step(font: ImageFont.FreeTypeFont) -> int:
    """Pixels from one line to the next."""
    ascent, descent = font.getmetrics()
    return ascent + descent + 1
