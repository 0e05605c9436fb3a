"""Photographs and masks as people have them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from projects.llava_sam2_rl.inference import load_image, load_mask

CORNERS = np.array(
    [[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[0, 0, 0], [250, 250, 250], [120, 120, 120]]],
    np.uint8,
).repeat(16, axis=0).repeat(16, axis=1)  # fmt: skip


def test_exif_turns_the_photograph(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying; shown turned clockwise by a quarter
    Image.fromarray(CORNERS).save(tmp_path / 'a.png', exif=exif)
    assert np.array_equal(load_image(tmp_path / 'a.png'), np.rot90(CORNERS, k=-1))


def test_cmyk_grey_palette_and_16_bit(tmp_path):
    Image.fromarray(CORNERS).convert('CMYK').save(tmp_path / 'cmyk.jpg', quality=98)
    read = load_image(tmp_path / 'cmyk.jpg')
    assert np.abs(read.astype(int) - CORNERS).mean() < 6
    Image.fromarray(CORNERS).convert('P').save(tmp_path / 'p.png')
    assert load_image(tmp_path / 'p.png').shape == CORNERS.shape
    grey = np.array([[0, 257, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / 'deep.png')
    assert load_image(tmp_path / 'deep.png')[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


def test_transparency_lies_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 255, 51  # black: clear, opaque, a fifth
    Image.fromarray(rgba).save(tmp_path / 'a.png')
    assert load_image(tmp_path / 'a.png')[0, :, 0].tolist() == [255, 0, 204]


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r'there is no image .*nowhere\.jpg'):
        load_image(tmp_path / 'nowhere.jpg')
    (tmp_path / 'text.jpg').write_text('not a picture')
    with pytest.raises(ValueError, match=r'text\.jpg is damaged or no image'):
        load_image(tmp_path / 'text.jpg')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(
        tmp_path / 'cut.jpg'
    )
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'cut.jpg').read_bytes()[:2000])
    with pytest.raises(ValueError, match=r'cut\.jpg is damaged'):
        load_image(tmp_path / 'cut.jpg')
    with pytest.raises(ValueError, match=r'the mask .*text\.jpg cannot be read'):
        load_mask(tmp_path / 'text.jpg')
    with pytest.raises(ValueError, match=r'\(H, W, 3\) uint8'):
        load_image(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r'must be \(H, W\)'):
        load_mask(np.zeros((2, 4, 4), bool))
