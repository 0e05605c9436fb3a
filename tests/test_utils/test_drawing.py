import numpy as np
import pytest

from projects.llava_sam2_rl.utils import drawing
from projects.llava_sam2_rl.utils.drawing import (
    Card,
    Row,
    Section,
    draw_page,
    faded,
    film_strip,
    fit,
    overlay,
    resize_mask,
    wrap,
)

LONG = 'a remarkably tall lamp ' * 40


def test_overlay_mixes_inside_and_leaves_the_rest():
    image = np.full((20, 30, 3), 100, np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:15, 5:15] = True
    drawn = overlay(image, mask, '#ff0000', fill=0.4, outline=1)
    assert drawn[10, 10].tolist() == [162, 60, 60]  # 0.6 * 100 + 0.4 * (255, 0, 0)
    assert drawn[5, 5].tolist() == [255, 0, 0]  # the border
    assert (drawn[~mask] == 100).all()
    assert (image == 100).all(), 'the input was drawn on'
    assert (overlay(image, ~mask & mask, '#ff0000') == image).all()


def test_overlay_draws_the_union_of_several_regions():
    image = np.zeros((20, 20, 3), np.uint8)
    masks = np.zeros((2, 20, 20), bool)
    masks[0, 2:8, 2:8] = masks[1, 12:18, 12:18] = True
    drawn = overlay(image, masks, '#ffffff', fill=1.0)
    assert (drawn.any(-1) == masks.any(0)).all()


def test_overlay_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r'mask is \(4, 5\), image \(5, 4\)'):
        overlay(np.zeros((5, 4, 3), np.uint8), np.zeros((4, 5), bool), 'red')


def test_faded_keeps_brightness_and_loses_colour():
    image = np.array([[[200, 100, 0]]], np.uint8)
    assert faded(image, colour=0.3).tolist() == [[[130, 100, 70]]]  # 100 + 0.3 * (100, 0, -100)


def test_fit_keeps_proportions():
    assert fit(100, 200, box=50) == (25, 50)
    assert fit(1000, 10, box=50) == (50, 1)


def test_a_region_of_one_pixel_stays_visible():
    mask = np.zeros((400, 400), bool)
    mask[399, 7] = True
    small = resize_mask(mask, (20, 20))
    assert small.sum() == 1
    assert small[19, 0]


def test_wrapped_lines_fit_and_lose_nothing():
    font = drawing._font(12)
    text = 'the quick  brown fox\njumps ' + 'pneumonoultramicroscopicsilicovolcanoconiosis' * 3
    lines = wrap(text, font, 90)
    assert max(map(font.getlength, lines)) <= 90
    assert ''.join(lines).replace(' ', '') == text.replace(' ', '').replace('\n', '')


def test_a_long_paragraph_ends_in_an_ellipsis():
    font = drawing._font(12)
    lines = wrap(LONG, font, 90, max_lines=3)
    assert len(lines) == 3
    assert lines[-1].endswith('…')
    assert max(map(font.getlength, lines)) <= 90
    assert wrap('short', font, 90, max_lines=3) == ['short']
    assert wrap(' \n', font, 90) == []


def test_what_cannot_be_printed_is_marked():
    assert wrap('a\x07b', drawing._font(12), 90) == ['a�b']


def card(**options) -> Card:
    options = {'picture': np.full((60, drawing.CELL, 3), 90, np.uint8), **options}
    return Card(**options)


def page(answers) -> np.ndarray:
    return draw_page([Section('title', 'why', [Row('row', card(caption='asked'), answers)])])


def test_nothing_leaves_its_card():
    scores = [('reward' * 20, 0.123), ('part', None), ('negative', -3.0), ('large', 1e9)]
    answers = [
        card(heading='#1', advantage=1.5, caption=LONG, note=LONG, scores=scores),
        card(heading='#2', advantage=-1.5, caption='W' * 200, scores=scores),
        card(heading='not scored'),
    ]
    picture = page(answers)
    pitch = drawing._CARD_WIDTH + drawing.GAP
    assert picture.shape[1] == 4 * pitch + drawing.GAP
    # The titles are short: so far right, the cards come first.
    top = next(y for y in range(len(picture)) if (picture[y, 3 * pitch + drawing.GAP] != 255).all())
    # The gaps between the cards are paper all the way down.
    for column in range(1, 5):
        gap = picture[top:, column * pitch + 1 : column * pitch + drawing.GAP - 1]
        assert (gap == 255).all(), column
    # Text keeps clear of the right edge of its card.
    for column in range(1, 4):
        right = drawing.GAP + column * pitch + drawing._CARD_WIDTH
        assert (picture[top + 30 : -drawing.GAP - 10, right - 4 : right] == 243).all(), column
    # And nothing is cut off below: the cards end in free space.
    bottom = picture[-drawing.GAP - drawing.PADDING : -drawing.GAP]
    assert set(np.unique(bottom)) <= {255, 243}


def test_a_card_grows_with_its_text():
    short, long = page([card(caption='a lamp')]), page([card(caption=LONG)])
    assert len(long) > len(short) + 50


def test_the_bar_tells_good_from_bad():
    def colour(advantage):
        red, green, _ = (int(x) for x in drawing._advantage_colour(advantage))
        return green - red

    assert colour(2.0) > colour(0.2) > 0 > colour(-0.2) > colour(-2.0)
    assert colour(0.0) == colour(None) == 0


def test_many_answers_take_several_lines():
    one = page([card()] * drawing.ANSWERS_PER_LINE)
    two = page([card()] * (drawing.ANSWERS_PER_LINE + 1))
    assert one.shape[1] == two.shape[1]
    assert len(two) > len(one) + 60


def test_a_page_without_answers():
    assert draw_page([Section('title', 'why', [Row('row', card(), [])])]).dtype == np.uint8


@pytest.mark.parametrize(
    ('count', 'shape', 'shown'),
    [
        (1, (24, 44), [0]),
        (2, (14, 44), [0, 1]),
        (4, (26, 44), [0, 1, 2, 3]),
        (5, (18, 44), [0, 1, 2, 3, 4]),
        (17, (26, 44), [0, 2, 4, 6, 8, 10, 12, 14, 16]),
    ],
)
def test_a_film_strip_reads_line_by_line(count, shape, shown):
    """Frames of 20 x 40 in a strip of 44: on black, evenly spread where there are too many."""
    frames = [np.full((20, 40, 3), 10 + 10 * t, np.uint8) for t in range(count)]
    strip = film_strip(frames, 44)
    assert strip.shape == (*shape, 3)
    # Row by row and from left to right, each value once.
    seen = [value for value in dict.fromkeys(strip[:, :, 0].flatten().tolist()) if value]
    assert seen == [10 + 10 * t for t in shown]
    assert not strip[0].any()
    assert not strip[:, 0].any()
