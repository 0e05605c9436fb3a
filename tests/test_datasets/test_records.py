from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.datasets.records import (
    decode_image,
    decode_rle,
    fit_mask,
    path_inside,
    polygons_to_mask,
    read_image,
    read_mask,
    segmentation_to_mask,
)

SHARED = Path(__file__).resolve().parents[2].parent / 'shared'


def reason(function, *arguments):
    with pytest.raises(BadRecord, match='set/1') as error:
        function(*arguments, 'set/1')
    return error.value.reason


def picture(height, width):
    return np.zeros((height, width, 3), np.uint8)


def random_mask(rng, height, width):
    return rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])


def uncompressed(mask):
    """Runs of a mask in column order, beginning with zeros: plain reference."""
    flat = mask.flatten(order='F').astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def test_both_forms_of_rle_decode():
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (7, 5), (40, 300), (500, 400)]:
        for mask in (random_mask(rng, height, width), np.zeros((height, width), bool)):
            packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            text = {'size': [float(height), width], 'counts': packed['counts'].decode()}
            for rle in (packed, text, {'size': [height, width], 'counts': uncompressed(mask)}):
                assert np.array_equal(decode_rle(rle, 'set/1'), mask)


@pytest.mark.parametrize(
    'rle',
    [
        {'counts': 'abc'},
        {'size': [4], 'counts': '0'},
        {'size': [4, 4], 'counts': None},
        {'size': [4, 4], 'counts': '0'},
        {'size': [4, 4], 'counts': 'é'},
        {'size': [4, 4], 'counts': '!!'},
        {'size': [4, 4], 'counts': [4, 4]},
        {'size': [4, 4], 'counts': [20, -4]},
        {'size': [0, 4], 'counts': []},
        {'size': [4, 4], 'counts': 'o' * 40},
        {'size': [4, 4], 'counts': ''},
        {'size': [float('inf'), 4], 'counts': '0'},
        {'size': [None, 4], 'counts': '0'},
        None,
    ],
)
def test_codes_that_do_not_decode_are_bad(rle):
    assert reason(decode_rle, rle) == 'bad_rle'


def test_a_code_that_was_cut_is_bad():
    rng = np.random.default_rng(1)
    packed = coco_mask.encode(np.asfortranarray(rng.random((60, 60)) < 0.5))
    cut = {'size': packed['size'], 'counts': packed['counts'][: len(packed['counts']) // 2]}
    assert reason(decode_rle, cut) == 'bad_rle'
    other_size = {'size': [61, 60], 'counts': packed['counts']}
    assert reason(decode_rle, other_size) == 'bad_rle'


def test_polygons_are_united_not_added():
    left, right = [0, 0, 6, 0, 6, 10, 0, 10], [4, 0, 10, 0, 10, 10, 4, 10]
    mask = polygons_to_mask([left, right], 12, 12, 'set/1')
    expected = np.zeros((12, 12), bool)
    expected[:10, :10] = True
    assert np.array_equal(mask, expected)
    assert mask.dtype == bool
    assert not polygons_to_mask([], 12, 12, 'set/1').any()


@pytest.mark.parametrize(
    'polygon', [[], [1, 2, 3, 4], [0, 0, 5, 0, 5], [0, 0, 5, 0, float('nan'), 1]]
)
def test_polygons_that_enclose_nothing_are_bad(polygon):
    assert reason(polygons_to_mask, [polygon], 8, 8) == 'bad_polygon'


def test_a_mask_of_the_images_aspect_is_resized_nearest():
    mask = np.zeros((2, 3), bool)
    mask[1, 2] = True
    fitted = fit_mask(mask, picture(20, 30), 'set/1')
    assert fitted.shape == (20, 30)
    assert fitted.dtype == bool
    assert fitted.sum() == 100
    assert fitted[10:, 20:].all()
    assert fit_mask(np.ones((333, 500), bool), picture(683, 1024), 'set/1').all()  # rounding of 2/3
    assert reason(fit_mask, np.ones((20, 30), bool), picture(30, 20)) == 'mask_aspect'


def test_pictures_of_other_modes_become_rgb(tmp_path):
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    grey.save(tmp_path / 'grey.png')
    assert np.array_equal(
        read_image(tmp_path / 'grey.png', 'set/1'), np.asarray(grey)[..., None].repeat(3, 2)
    )
    rgba = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    Image.fromarray(rgba, 'RGBA').save(tmp_path / 'rgba.png')
    assert np.array_equal(read_image(tmp_path / 'rgba.png', 'set/1'), rgba[..., :3])


def test_real_rgba_pictures_become_rgb():
    folder = SHARED / 'realdata' / 'gar_demo'
    if not folder.is_dir():
        pytest.skip(f'no real pictures at {folder}')
    for name, mode in (('demo_image_1.png', 'RGBA'), ('demo_image_3.png', 'RGB')):
        with Image.open(folder / name) as picture:
            assert picture.mode == mode
            width, height = picture.size
            red = np.asarray(picture)[..., 0]
        image = read_image(folder / name, 'set/1')
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        assert np.array_equal(image[..., 0], red)


def test_files_that_are_no_pictures_are_bad(tmp_path, monkeypatch):
    assert reason(read_image, tmp_path / 'none.png') == 'missing_image'
    (tmp_path / 'text.jpg').write_text('no picture')
    assert reason(read_image, tmp_path / 'text.jpg') == 'corrupt_image'
    (tmp_path / 'empty.jpg').touch()
    assert reason(read_image, tmp_path / 'empty.jpg') == 'corrupt_image'
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ('png', 'jpg'):
        path = tmp_path / f'whole.{suffix}'
        Image.fromarray(noise).save(path)
        cut = tmp_path / f'cut.{suffix}'
        cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert reason(read_image, cut) == 'corrupt_image'
    # Between the limit and twice the limit PIL itself only warns.
    for limit in (64 * 64 - 1, 64 * 64 // 3):
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
        assert reason(read_image, tmp_path / 'whole.png') == 'image_too_large'


def smooth(height=60, width=90):
    """A picture without sharp edges, so that JPEG changes it little."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 4 % 256, x * 2 % 256, 0 * x + 90], axis=2).astype(np.uint8)


def test_palette_and_grey_with_alpha(tmp_path):
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    picture = Image.fromarray(indices, 'P')
    picture.putpalette(palette.tobytes())
    picture.save(tmp_path / 'plain.png')
    picture.save(tmp_path / 'transparent.png', transparency=bytes([0] * 6 + [255] * 250))
    for name in ('plain', 'transparent'):
        assert np.array_equal(read_image(tmp_path / f'{name}.png', 'set/1'), palette[indices])
    grey = np.stack([indices * 20, indices], axis=2)
    Image.fromarray(grey, 'LA').save(tmp_path / 'la.png')
    expected = np.repeat(grey[..., :1], 3, axis=2)
    assert np.array_equal(read_image(tmp_path / 'la.png', 'set/1'), expected)


def test_sixteen_bits_become_eight_without_clipping(tmp_path):
    levels = np.array([[0, 257, 128 * 257], [65535, 300, 40000]], np.uint16)
    Image.fromarray(levels).save(tmp_path / 'deep.png')
    Image.fromarray(levels).save(tmp_path / 'deep.tiff')
    for name in ('deep.png', 'deep.tiff'):
        image = read_image(tmp_path / name, 'set/1')
        assert image[..., 1].tolist() == [[0, 1, 128], [255, 1, 156]]
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / 'float.tiff')
    assert reason(read_image, tmp_path / 'float.tiff') == 'unsupported_image'


def test_the_content_decides_not_the_name(tmp_path):
    pixels = smooth()
    Image.fromarray(pixels).save(tmp_path / 'photo.jpg', quality=95)
    (tmp_path / 'photo.jpg').rename(tmp_path / 'photo.png')
    with Image.open(tmp_path / 'photo.png') as picture:
        assert picture.format == 'JPEG'
        expected = np.asarray(picture)
    assert np.array_equal(read_image(tmp_path / 'photo.png', 'set/1'), expected)
    raw = (tmp_path / 'photo.png').read_bytes()
    assert np.array_equal(decode_image(raw, 'set/1'), expected)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('progressive', [False, True])
def test_jpegs_are_what_pil_makes_of_them(tmp_path, mode, progressive):
    Image.fromarray(smooth()).convert(mode).save(
        tmp_path / 'a.jpg', quality=90, progressive=progressive
    )
    with Image.open(tmp_path / 'a.jpg') as picture:
        assert picture.mode == mode
        expected = np.asarray(picture.convert('RGB'))
    image = read_image(tmp_path / 'a.jpg', 'set/1')
    assert np.array_equal(image, expected)
    if mode != 'L':
        # And not inverted, as CMYK easily is.
        assert np.abs(image.astype(int) - smooth()).mean() < 6


def test_a_jpeg_that_is_cut_anywhere_is_bad(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / 'a.jpg')
    raw = (tmp_path / 'a.jpg').read_bytes()
    for share in (0.02, 0.2, 0.5, 0.9, 0.99):
        with pytest.raises(BadRecord, match='corrupt_image'):
            decode_image(raw[: int(len(raw) * share)], 'set/1')
    # Something after the end harms nobody.
    assert np.array_equal(decode_image(raw + bytes(9), 'set/1'), decode_image(raw, 'set/1'))
    assert reason(lambda name: decode_image(bytes(5000), name)) == 'corrupt_image'


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_exif_turns_only_what_was_annotated_turned(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((60, 90, 3), np.uint8)
    stored[:30, :45] = 255
    Image.fromarray(stored).save(tmp_path / 'a.jpg', exif=exif, quality=95)
    path = tmp_path / 'a.jpg'
    for annotated in (None, (60, 90), (120, 180), (50, 50)):
        image = read_image(path, 'set/1', annotated)
        assert np.array_equal(image[..., 0] > 128, stored[..., 0] > 128)
    turned = read_image(path, 'set/1', (90, 60))
    if orientation in (1, 3):
        assert turned.shape == (60, 90, 3)
    else:
        assert turned.shape == (90, 60, 3)
        # 6: a quarter clockwise takes the top left corner to the top right; 8: to the bottom left.
        corner = turned[:45, 30:] if orientation == 6 else turned[45:, :30]
        assert corner.mean() > 250
        assert turned.mean() == pytest.approx(255 / 4, abs=3)


def test_masks_are_all_that_is_not_black(tmp_path):
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:7] = True
    pictures = {
        '1': Image.fromarray(mask),
        'L1': Image.fromarray(mask.astype(np.uint8)),
        'L255': Image.fromarray(mask.astype(np.uint8) * 255),
        '16': Image.fromarray(mask.astype(np.uint16)),
        'RGB': Image.fromarray(np.stack([mask * 0, mask * 3, mask * 0], 2).astype(np.uint8)),
        'RGBA': Image.fromarray(
            np.stack([*[mask * 255] * 3, mask * 0 + 255], 2).astype(np.uint8), 'RGBA'
        ),
    }
    palette = Image.fromarray(mask.astype(np.uint8), 'P')
    palette.putpalette([0, 0, 0, 128, 0, 0])
    pictures['P'] = palette
    for name, picture in pictures.items():
        picture.save(tmp_path / f'{name}.png')
        assert np.array_equal(read_mask(tmp_path / f'{name}.png', 'set/1'), mask), name
    assert reason(read_mask, tmp_path / 'gone.png') == 'missing_mask'
    (tmp_path / 'text.png').write_text('no picture')
    assert reason(read_mask, tmp_path / 'text.png') == 'corrupt_mask'


def test_sizes_beyond_all_measure_are_refused_before_memory_is_taken():
    huge = 10**6
    assert reason(decode_rle, {'size': [huge, huge], 'counts': [huge * huge]}) == 'mask_too_large'
    assert reason(polygons_to_mask, [[0, 0, 5, 0, 5, 5]], huge, huge) == 'mask_too_large'
    assert reason(polygons_to_mask, [[0, 0, 5, 0, 5, 5]], 0, 5) == 'bad_polygon'
    assert reason(polygons_to_mask, [['a', 'b']], 5, 5) == 'bad_polygon'
    for segmentation in (None, 'text', 7):
        assert reason(segmentation_to_mask, segmentation, 5, 5) == 'bad_segmentation'


@pytest.mark.parametrize(
    'name', ['../a.jpg', 'x/../../a.jpg', '/etc/a.jpg', '', 'C:\\a.jpg', '..\\a']
)
def test_names_that_leave_the_folder_are_bad(name, tmp_path):
    assert reason(path_inside, tmp_path, name) == 'unsafe_path'


def test_names_below_the_folder_are_joined(tmp_path):
    assert path_inside(tmp_path, 'x/a..b.jpg', 'set/1') == tmp_path / 'x' / 'a..b.jpg'
