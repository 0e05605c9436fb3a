"""Sa2VA on photographs as people have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from projects.llava_sam2_rl.datasets import GeneratedScenes
from projects.llava_sam2_rl.inference import Sa2VA, load_image, load_mask
from projects.llava_sam2_rl.rewards.meteor import meteor

MODEL = 'llava_sam2_rl://assets/sa2va_tiny'


@pytest.fixture(scope='module')
def model():
    return Sa2VA.from_pretrained(MODEL, device='cpu')


@pytest.fixture(scope='module')
def scenes():
    plain = GeneratedScenes(length=12, split='val')
    return [plain[i]['sample'] for i in range(12)]


def test_finds_what_the_text_names(model, scenes):
    """Far from the mask of another object's description: 0.8 against 0.02 on average."""
    ious, others = [], []
    for scene in scenes:
        for text, values in ((scene.caption, ious), (scene.distractor, others)):
            found = model.segment(scene.image, text)
            assert found.mask.dtype == bool
            assert found.mask.shape == scene.image.shape[:2]
            assert found.found
            assert '[SEG]' in found.answer
            union = (found.mask | scene.mask).sum()
            values.append((found.mask & scene.mask).sum() / union)
    assert np.mean(ious) > 0.6
    assert np.mean(others) < 0.15


def test_describes_what_the_mask_covers(model, scenes):
    """Nearer to the region's own description (0.46 METEOR) than to another one's (0.27)."""
    own, other = [], []
    for scene in scenes:
        caption = model.describe(scene.image, scene.mask)
        assert '<|' not in caption
        assert '[SEG]' not in caption
        own.append(meteor(scene.caption, caption))
        other.append(meteor(scene.distractor, caption))
    assert np.mean(own) > np.mean(other) + 0.1


def test_answers_are_those_of_the_cycle(model, scenes, tiny_model):
    """The same caption that training's own evaluation generates for this region."""
    from projects.llava_sam2_rl.datasets import sa2va_collate
    from projects.llava_sam2_rl.models.captioning import write_captions

    tiny_model.eval()
    items = [model.transform(scene) for scene in scenes[:3]]
    batch = tiny_model.encode(sa2va_collate(items)['data'])
    written = write_captions(tiny_model.policy, batch, tiny_model.max_new_tokens)
    assert [model.describe(s.image, s.mask) for s in scenes[:3]] == written


def test_files_and_arrays_say_the_same(model, scenes, tmp_path):
    scene = scenes[0]
    Image.fromarray(scene.image).save(tmp_path / 'photo.png')
    Image.fromarray(scene.mask).save(tmp_path / 'mask.png')
    from_files = model.describe(tmp_path / 'photo.png', str(tmp_path / 'mask.png'))
    assert from_files == model.describe(scene.image, scene.mask)
    opened = model.segment(Image.fromarray(scene.image), scene.caption)
    assert np.array_equal(opened.mask, model.segment(scene.image, scene.caption).mask)


def test_one_pixel(model):
    image = np.full((1, 1, 3), 200, np.uint8)
    assert model.segment(image, 'the red square').mask.shape == (1, 1)
    assert isinstance(model.describe(image, np.ones((1, 1), bool)), str)


def test_a_ribbon(model):
    image = np.zeros((3, 400, 3), np.uint8)
    assert model.segment(image, 'the red square').mask.shape == (3, 400)


def test_empty_mask_other_size_and_no_text(model, scenes):
    image = scenes[0].image
    height, width = image.shape[:2]
    with pytest.raises(ValueError, match='the mask is empty'):
        model.describe(image, np.zeros((height, width), bool))
    with pytest.raises(ValueError, match=rf'mask is 7 x 5 pixels, the photograph {width} x'):
        model.describe(image, np.ones((5, 7), bool))
    for text in ('', ' . ', '<|end|>', '[SEG]'):
        with pytest.raises(ValueError, match='names nothing'):
            model.segment(image, text)


def test_no_seg_is_an_empty_mask_and_said(model, scenes, monkeypatch):
    seg = model.policy.seg_token_id
    generate = model.policy.generate
    monkeypatch.setattr(
        model.policy, 'generate', lambda *a, **k: generate(*a, suppress_tokens=[seg], **k)
    )
    found = model.segment(scenes[0].image, 'the dragon')
    assert not found.found
    assert not found.mask.any()
    assert found.mask.shape == scenes[0].image.shape[:2]
    assert found.answer


# -- pictures --------------------------------------------------------------------------------------

CORNERS = np.array(
    [[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[0, 0, 0], [250, 250, 250], [120, 120, 120]]],
    np.uint8,
).repeat(16, axis=0).repeat(16, axis=1)  # fmt: skip


def test_exif_turns_the_photograph(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying; shown turned clockwise by a quarter
    Image.fromarray(CORNERS).save(tmp_path / 'a.png', exif=exif)
    assert np.array_equal(load_image(tmp_path / 'a.png'), np.rot90(CORNERS, k=-1))


def test_a_mask_of_the_stored_pixels_is_named_as_such(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(CORNERS).save(tmp_path / 'a.png', exif=exif)
    with pytest.raises(ValueError, match=r'mask is 48 x 32 pixels, the photograph 32 x 48.*EXIF'):
        model.describe(tmp_path / 'a.png', np.ones((32, 48), bool))


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


@pytest.mark.parametrize('tiles', [1, 4])
def test_tiles(scenes, tiles):
    """A photograph in tiles takes more image tokens; the mask keeps its size."""
    model = Sa2VA.from_pretrained(MODEL, device='cpu', max_dynamic_patch=tiles)
    wide = np.concatenate([scenes[0].image] * 2, axis=1)
    item = model._batch(wide, np.ones(wide.shape[:2], bool))[0]
    assert (len(item['pixel_values'][0]) > 1) == (tiles > 1)
    assert model.segment(wide, scenes[0].caption).mask.shape == wide.shape[:2]
    assert isinstance(model.describe(wide, np.ones(wide.shape[:2], bool)), str)


def test_bfloat16(scenes):
    model = Sa2VA.from_pretrained(MODEL, device='cpu', torch_dtype=torch.bfloat16)
    found = model.segment(scenes[0].image, scenes[0].caption)
    assert (found.mask & scenes[0].mask).sum() / (found.mask | scenes[0].mask).sum() > 0.5
