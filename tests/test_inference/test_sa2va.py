"""Sa2VA on photographs as people have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from projects.llava_sam2_rl.datasets import GeneratedScenes
from projects.llava_sam2_rl.inference import Box, Sa2VA
from projects.llava_sam2_rl.inference.answers import read_answer
from projects.llava_sam2_rl.models.free_generation import SegmentationAnswer
from projects.llava_sam2_rl.rewards.meteor import meteor
from projects.llava_sam2_rl.structures import RegionSample

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
            assert '<|end|>' not in found.answer
            assert np.array_equal(found.masks.any(axis=0), found.mask)
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


def test_a_mask_of_the_stored_pixels_is_named_as_such(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (48, 32)).save(tmp_path / 'a.png', exif=exif)
    with pytest.raises(ValueError, match=r'mask is 48 x 32 pixels, the photograph 32 x 48.*EXIF'):
        model.describe(tmp_path / 'a.png', np.ones((32, 48), bool))


@pytest.mark.parametrize('tiles', [1, 4])
def test_tiles(scenes, tiles):
    """A photograph in tiles takes more image tokens; the mask keeps its size."""
    model = Sa2VA.from_pretrained(MODEL, device='cpu', max_dynamic_patch=tiles)
    wide = np.concatenate([scenes[0].image] * 2, axis=1)
    item = model.transform(RegionSample(wide, np.ones(wide.shape[:2], bool)))
    assert (len(item['pixel_values']) > 1) == (tiles > 1)
    assert model.segment(wide, scenes[0].caption).mask.shape == wide.shape[:2]
    assert isinstance(model.describe(wide, np.ones(wide.shape[:2], bool)), str)


def test_bfloat16(scenes):
    model = Sa2VA.from_pretrained(MODEL, device='cpu', torch_dtype=torch.bfloat16)
    found = model.segment(scenes[0].image, scenes[0].caption)
    assert (found.mask & scenes[0].mask).sum() / (found.mask | scenes[0].mask).sum() > 0.5


# -- lists -----------------------------------------------------------------------------------------


@pytest.fixture
def questions(model, monkeypatch):
    """How many questions went to the model at a time."""
    sizes: list[int] = []
    generate = model.policy.generate

    def spy(data, *args, **options):
        sizes.append(len(data['input_ids']))
        return generate(data, *args, **options)

    monkeypatch.setattr(model.policy, 'generate', spy)
    return sizes


def test_a_batch_answers_as_one_by_one(model, scenes, questions):
    """Texts and regions of different lengths, several of an image, in one call each."""
    images = [scene.image for scene in scenes[:4]]
    other = GeneratedScenes(length=12, split='val')[7]['sample'].mask
    masks = [scenes[0].mask, [scenes[1].mask, other], scenes[2].mask, [scenes[3].mask]]
    said = model.describe(images, masks)
    assert questions == [5]
    alone = [
        model.describe(images[0], masks[0]),
        [model.describe(images[1], mask) for mask in masks[1]],
        model.describe(images[2], masks[2]),
        [model.describe(images[3], masks[3][0])],
    ]
    assert said == alone
    assert len({said[0], *said[1], said[2], *said[3]}) > 2

    del questions[:]
    texts = [[s.caption, s.distractor, 'the large red square in the middle'] for s in scenes[:3]]
    found = model.segment(images[:3], texts)
    assert questions == [8, 1]  # no more than batch_size at a time
    for image, asked, row in zip(images, texts, found):
        for text, answer in zip(asked, row):
            single = model.segment(image, text)
            assert (answer.answer, answer.found) == (single.answer, single.found)
            assert np.array_equal(answer.masks, single.masks)
    assert not np.array_equal(found[0][0].mask, found[0][1].mask)


def test_several_regions_of_an_image_are_a_list(model, scenes, questions):
    masks = [scenes[0].mask, np.ones_like(scenes[0].mask)]
    said = model.describe(scenes[0].image, masks)
    assert questions == [2]
    assert said == [model.describe(scenes[0].image, mask) for mask in masks]
    assert model.describe(scenes[0].image, []) == []
    assert model.segment([], []) == []


def test_the_image_is_encoded_once_for_all_its_questions(model, scenes, monkeypatch):
    seen = []
    encode = model.policy.encode_images
    monkeypatch.setattr(
        model.policy,
        'encode_images',
        lambda data, **k: seen.append(len(data['pixel_values'])) or encode(data, **k),
    )
    model.segment([scenes[0].image, scenes[1].image], [['red', 'blue', 'green'], 'red'])
    assert seen == [2]


def test_batch_size_bounds_what_is_asked_at_a_time(scenes, monkeypatch):
    model = Sa2VA.from_pretrained(MODEL, device='cpu', batch_size=2)
    sizes = []
    generate = model.policy.generate
    monkeypatch.setattr(
        model.policy,
        'generate',
        lambda data, *a, **k: sizes.append(len(data['input_ids'])) or generate(data, *a, **k),
    )
    assert len(model.segment(scenes[0].image, ['red', 'blue', 'green', 'a cross', 'a star'])) == 5
    assert sizes == [2, 2, 1]
    with pytest.raises(ValueError, match='batch_size must be at least 1, got 0'):
        Sa2VA(model.policy, batch_size=0)


def test_errors_of_lists_name_the_position(model, scenes, tmp_path):
    image, mask = scenes[0].image, scenes[0].mask
    with pytest.raises(ValueError, match=r'question 2 of 3: the mask is empty'):
        model.describe(image, [mask, np.zeros_like(mask), mask])
    with pytest.raises(ValueError, match=r"question 3 of 3: the text '' names nothing"):
        model.segment([image, image], ['a', ['b', '']])
    with pytest.raises(ValueError, match=r'question 2 of 2: there is no image .*no\.png'):
        model.segment([image, tmp_path / 'no.png'], ['a', 'b'])
    with pytest.raises(ValueError, match='2 photographs, but 1 regions: give an entry for each'):
        model.describe([image, image], [mask])
    with pytest.raises(ValueError, match='2 photographs, but no list of texts'):
        model.segment([image, image], 'a cup')


# -- several objects in one answer -----------------------------------------------------------------


def test_every_object_of_an_answer_has_its_mask(model, scenes, monkeypatch):
    """The answer is put into the model's mouth; the masks are its own."""
    ids = model.policy.tokenizer.encode(
        '<p> a cup </p> [SEG] and <p> two plates </p> [SEG].<|end|>', add_special_tokens=False
    )
    monkeypatch.setattr(model.policy, 'generate', lambda *a, **k: torch.tensor([ids]))
    found = model.ask(scenes[0].image, 'Please answer with interleaved segmentation masks.')
    assert found.answer == '<p> a cup </p> [SEG] and <p> two plates </p> [SEG].'
    assert found.phrases == ('a cup', 'two plates')
    assert found.masks.shape == (2, *scenes[0].image.shape[:2])
    assert np.array_equal(found.mask, found.masks[0] | found.masks[1])


@pytest.mark.parametrize(
    ('text', 'number', 'phrases'),
    [
        ('It is [SEG].', 1, (None,)),
        ('[SEG] and <p> it </p> [SEG]', 2, (None, 'it')),
        # A phrase belongs to the marker right behind it.
        ('<p> a </p> or <p> b </p>[SEG] [SEG]', 2, ('b', None)),
        # Spelled, not pointed with: there are other masks than markers.
        ('<p> a </p> [SEG] [SEG]', 1, (None,)),
        ('There is none.', 0, ()),
    ],
)
def test_phrases_of_an_answer(text, number, phrases):
    masks = torch.ones(number, 2, 3, dtype=torch.bool)
    answer = SegmentationAnswer(text + '<|end|>', masks.any(dim=0), number, masks)
    read = read_answer(answer, ['<|end|>'])
    assert read.phrases == phrases
    assert read.answer == text
    assert read.found == (number > 0)


def test_a_seg_of_no_pixel_has_found_nothing():
    """Models that learn from texts without an object answer with `[SEG]` and an empty mask."""
    masks = torch.zeros(1, 2, 3, dtype=torch.bool)
    read = read_answer(SegmentationAnswer('It is [SEG].', masks[0], 1, masks), [])
    assert not read.found
    assert read.mask.shape == (2, 3)


def test_a_question_is_sent_as_it_is(model, scenes, monkeypatch):
    sent = []
    encode = model.policy.tokenizer.encode
    monkeypatch.setattr(
        model.policy.tokenizer, 'encode', lambda text, **k: sent.append(text) or encode(text, **k)
    )
    model.ask(scenes[0].image, 'What do you see?', max_new_tokens=2)
    assert any(text.endswith('</img>\nWhat do you see?<|end|>\n<|assistant|>\n') for text in sent)


def test_a_box_is_the_mask_that_sam_makes_of_it(model, scenes):
    """Whether that mask is right is tests/test_models/test_sa2va/test_points.py's business."""
    image = scenes[0].image
    height, width = image.shape[:2]
    box = Box(0.1 * width, 0.1 * height, 0.9 * width, 0.9 * height)
    mask = model.region_mask(image, box)
    assert mask.shape == (height, width)
    assert mask.any()
    assert model.describe(image, [box, scenes[0].mask]) == [
        model.describe(image, mask),
        model.describe(image, scenes[0].mask),
    ]
    with pytest.raises(ValueError, match=rf'beyond the photograph, which is {width} x {height}'):
        model.describe(image, Box(0, 0, width + 1, 5))


def test_a_box_with_nothing_in_it(model, scenes, monkeypatch):
    sam = model.policy.grounding_encoder
    monkeypatch.setattr(sam, 'decode_points', lambda *a: torch.full((1, 1, 4, 4), -1.0))
    with pytest.raises(ValueError, match=r'SAM 2 finds nothing at Box\(left=1'):
        model.describe(scenes[0].image, Box(1, 1, 5, 5))
