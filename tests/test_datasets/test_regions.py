import io

import numpy as np
import pytest
from own_data import rle
from PIL import Image

from projects.llava_sam2_rl.datasets import BadRecord
from projects.llava_sam2_rl.datasets.regions import draw_caption, read_region

IMAGE = np.zeros((20, 30, 3), np.uint8)
MASK = np.zeros((20, 30), bool)
MASK[4:12, 6:24] = True
#: The outline through the centres of the pixels at its rim.
CORNERS = [[6, 4], [24, 4], [24, 12], [6, 12]]


def region(value, folder=None, sizes=None):
    def read(size):
        if sizes is not None:
            sizes.append(size)
        return IMAGE

    return read_region(read, value, folder, 'set/1')[1]


def encoded(mask):
    file = io.BytesIO()
    Image.fromarray(mask).save(file, 'PNG')
    return file.getvalue()


def test_every_form_of_a_mask_gives_the_same_region(tmp_path):
    Image.fromarray(MASK).save(tmp_path / 'm.png')
    # Column by column: 6 columns and 4 rows before it, 8 rows in each of 18 columns.
    plain = {'size': [20, 30], 'counts': [124, *[8, 12] * 17, 8, 128]}
    sizes: list = []
    for value in (
        'm.png',
        str(tmp_path / 'm.png'),
        encoded(MASK),
        {'bytes': encoded(MASK), 'path': None},
        {'bytes': None, 'path': 'm.png'},
        rle(MASK),
        plain,
    ):
        assert np.array_equal(region(value, tmp_path, sizes), MASK), value
    # What brings a size says it, so that a picture that EXIF turns can be turned.
    assert sizes == [(20, 30)] * 7
    flat = [x for corner in CORNERS for x in corner]
    drawn = [region(value) for value in (flat, [flat], CORNERS, [CORNERS])]
    assert all(np.array_equal(mask, MASK) for mask in drawn)
    both = region([[0, 0, 5, 0, 5, 5, 0, 5], flat])
    assert both.sum() == MASK.sum() + 25


def test_a_mask_of_another_size_is_brought_to_the_pictures():
    small = MASK[::2, ::2]
    assert np.array_equal(region(encoded(small)), np.kron(small, np.ones((2, 2), bool)))


@pytest.mark.parametrize(
    ('value', 'reason'),
    [
        (None, 'missing_mask'),
        ('', 'missing_mask'),
        ('gone.png', 'missing_mask'),
        ('../m.png', 'unsafe_path'),
        ('/etc/passwd', 'unsafe_path'),
        (b'no picture', 'corrupt_mask'),
        ({'bytes': None, 'path': None}, 'missing_mask'),
        ({'size': [20, 30], 'counts': 'x'}, 'bad_rle'),
        ({'size': [20, 30], 'counts': None}, 'bad_rle'),
        ({'a': 1}, 'bad_mask'),
        (3.5, 'bad_mask'),
        ([1, 2, 3], 'bad_polygon'),
        ([[1, 2, 3, 4]], 'bad_polygon'),
        (['a', 'b'], 'bad_polygon'),
        ([[None] * 6], 'bad_polygon'),
        ([[1, 2], [3, 4]], 'bad_polygon'),
        ([0, 0, 1e9, 0, 1e9, 1e9], 'bad_polygon'),
        ([0, 0, 10**400, 0, 1, 1], 'bad_polygon'),
        ([0, 0, float('nan'), 0, 1, 1], 'bad_polygon'),
        ([{'size': [20, 30], 'counts': 'x'}], 'bad_polygon'),
        (encoded(MASK.T), 'mask_aspect'),
    ],
)
def test_what_is_no_mask_is_a_bad_record(tmp_path, value, reason):
    with pytest.raises(BadRecord, match=f'set/1: {reason}'):
        region(value, tmp_path)


def test_captions_are_drawn():
    rng = np.random.default_rng(0)
    assert draw_caption('a dog', rng, 'set/1') == 'a dog'
    assert {draw_caption(['a', '', ' ', None, 'b'], rng, 'set/1') for _ in range(30)} == {'a', 'b'}
    for nothing in (None, '', ' \n', [], ['', None]):
        assert draw_caption(nothing, rng, 'set/1') is None
    for bad in (3, {'a': 1}, [['a']], b'a'):
        with pytest.raises(BadRecord, match='bad_caption'):
            draw_caption(bad, rng, 'set/1')
    with pytest.raises(BadRecord, match='set/1: bad_encoding'):
        draw_caption(b'caf\xe9'.decode('utf-8', 'surrogateescape'), rng, 'set/1')
