"""The official fine-tuning format against what the official data set made of it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import Sa2VAFinetuneDataset, Sa2VATransform, sa2va_collate

BOX = [[2, 2, 12, 2, 12, 9, 2, 9]]
RLE = coco_mask.encode(np.asfortranarray(np.ones((20, 30), np.uint8)))
RLE = {'size': RLE['size'], 'counts': RLE['counts'].decode()}


@pytest.fixture
def official(root):
    return root / 'tests/data/metrics'


def write(folder, *entries):
    (folder / 'images').mkdir(exist_ok=True)
    Image.new('RGB', (30, 20), (200, 0, 0)).save(folder / 'images/a.png')
    (folder / 'annotations.json').write_text(json.dumps(list(entries)))
    return str(folder)


def entry(masks, texts, image='a.png'):
    return {'image': image, 'mask': masks, 'text': texts}


def test_masks_and_texts_are_the_official_ones(official):
    data = Sa2VAFinetuneDataset(str(official / 'finetune'))
    turns = json.loads((official / 'finetune/conversations.json').read_text())
    annotations = json.loads((official / 'finetune/annotations.json').read_text())
    images = [raw['image'] for raw in annotations]
    with np.load(official / 'golden.npz') as golden:
        assert len(data) == len(images) == 2
        for i, name in enumerate(images):
            sample = data[i]['sample']
            assert np.array_equal(sample.mask, golden[f'finetune_{i}/masks'] > 0)
            asked = [turn['value'] for turn in turns[name] if turn['from'] == 'human']
            found = [re.search('segment (.*) in this image', text)[1] for text in asked]
            assert list(sample.region_captions) == found
            assert sample.caption is None
            assert sample.image.shape[:2] == sample.mask.shape[1:]


def test_an_evaluation_gets_every_object_once(official):
    data = Sa2VAFinetuneDataset(str(official / 'finetune'), per_object=True)
    samples = [item['sample'] for item in data]
    assert [sample.caption for sample in samples] == [
        'the red triangle',
        'two overlapping boxes',
        'upper half',
    ]
    assert [sample.sample_id for sample in samples] == ['0-0', '0-1', '1-0']
    with np.load(official / 'golden.npz') as golden:
        assert np.array_equal(samples[1].mask[0], golden['finetune_0/masks'][1] > 0)


def test_only_one_final_full_stop_goes(tmp_path):
    data = Sa2VAFinetuneDataset(write(tmp_path, entry([BOX, BOX], ['The Cup..', 'no. 5'])))
    assert data[0]['sample'].region_captions == ('the cup.', 'no. 5')


def test_of_too_many_objects_some_are_drawn_anew_each_time(tmp_path):
    boxes = [[[x, 2, x + 3, 2, x + 3, 9, x, 9]] for x in range(0, 24, 4)]
    texts = [f'box {k}' for k in range(6)]
    data = Sa2VAFinetuneDataset(write(tmp_path, entry(boxes, texts)), max_objects=2)
    drawn = [data[epoch]['sample'] for epoch in range(30)]
    assert {text for sample in drawn for text in sample.region_captions} == set(texts)
    for sample in drawn:
        assert len(sample.region_captions) == 2
        for text, mask in zip(sample.region_captions, sample.mask, strict=True):
            # The text stays with its mask.
            assert mask.any(axis=0).argmax() == 4 * int(text[-1])
    again = Sa2VAFinetuneDataset(str(tmp_path), max_objects=2)
    assert again[7]['sample'].region_captions == drawn[7].region_captions


def test_items_and_batches_keep_text_and_mask_together(official):
    transform = Sa2VATransform(image_size=28, grounding_size=32)
    data = Sa2VAFinetuneDataset(str(official / 'finetune'), transforms=transform)
    batch = sa2va_collate(list(data))['data']
    assert batch['region_captions'] == [
        ('the red triangle', 'two overlapping boxes'),
        ('upper half',),
    ]
    assert batch['captions'] == [None, None]
    assert [len(masks) for masks in batch['masks']] == [2, 1]


def test_withheld_texts_leave_the_regions(official):
    data = Sa2VAFinetuneDataset(str(official / 'finetune'), withhold_captions=True)
    assert data[0]['sample'].region_captions == (None, None)
    assert data[0]['sample'].texts == ()


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        (entry([RLE], ['a cup']), r'mask 0 is a run-length code.*polygons only.*findContours'),
        (entry([BOX, [RLE]], ['a', 'b']), r'mask 1 is a run-length code'),
        (entry(RLE, ['a cup']), r'mask is a run-length code'),
        (entry([BOX, BOX], ['a cup', '']), r"text 1 is '': write what mask 1 shows"),
        (entry([BOX], [' . ']), r"text 0 is ' \. '"),
        (entry([BOX], [None]), r'text 0 is None'),
        (entry([BOX, BOX], ['a cup']), r'1 texts for 2 masks: give each mask a text'),
        (entry([BOX], ['a cup', 'b']), r'2 texts for 1 masks'),
        (entry([], []), r"mask must be a list, one for each object, got '\[\]'"),
        (entry([BOX[0]], ['a cup']), r'mask 0 must be a list of polygons'),
        (entry([None], ['a cup']), r"mask 0 must be a list of polygons.*got 'None'"),
        (entry([BOX], 'a cup'), r"text must be a list, one for each object, got 'a cup'"),
        ({'image': 'a.png', 'mask': [BOX]}, r"must have image, mask and text, has \['image', 'ma"),
        (entry([BOX], ['a'], image=3), r'image is 3'),
        ([], r'must have image, mask and text, has a list'),
    ],
)
def test_a_bad_entry_is_named_with_file_entry_and_fix(tmp_path, bad, message):
    good = entry([BOX], ['a cup'])
    folder = write(tmp_path, good, bad, good)
    with pytest.raises(ValueError, match=message) as error:
        Sa2VAFinetuneDataset(folder)
    assert f'{tmp_path}/annotations.json, entry 1' in str(error.value)
    folder = write(tmp_path, good, bad, bad)
    with pytest.raises(ValueError, match=r'\(2 of 3 entries are at fault\)'):
        Sa2VAFinetuneDataset(folder)


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        (entry([BOX], ['a cup'], image='gone.png'), 'missing_image'),
        (entry([BOX], ['a cup'], image='../images/a.png'), 'unsafe_path'),
        (entry([BOX, [[1, 2, 3]]], ['a', 'b']), 'bad_polygon'),
        (entry([BOX, [[90, 90, 95, 90, 95, 95]]], ['a', 'b']), 'empty_mask'),
        (entry([BOX, []], ['a', 'b']), 'empty_mask'),
    ],
)
def test_what_only_reading_shows_is_counted_and_replaced(tmp_path, bad, reason):
    data = Sa2VAFinetuneDataset(write(tmp_path, bad, entry([BOX], ['a cup'])))
    item = data[0]
    assert item['sample'].region_captions == ('a cup',)
    assert set(item['skipped']) == {('sa2va_finetune', '0', reason)}


def test_what_is_no_annotation_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'annotations\.json is not there.*"mask"'):
        Sa2VAFinetuneDataset(str(tmp_path))
    for text, message in (('{', 'is no JSON'), ('{}', 'must be a list'), ('[]', 'not empty')):
        (tmp_path / 'annotations.json').write_text(text)
        with pytest.raises(ValueError, match=message):
            Sa2VAFinetuneDataset(str(tmp_path))
