import json

import numpy as np
import pytest
import torch
from PIL import Image

from projects.llava_sam2_rl.datasets import (
    BadRecord,
    ConversationDataset,
    Photographs,
    Sa2VATransform,
    sa2va_collate,
)
from projects.llava_sam2_rl.structures import RegionSample


def message(i, text):
    return {'from': ('human', 'gpt')[i % 2], 'value': text}


def record(id, *texts, image='coco/a.jpg'):
    return {'id': id, 'image': image, 'conversations': [message(*t) for t in enumerate(texts)]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'images/coco').mkdir(parents=True)
    Image.new('RGB', (40, 30), (200, 0, 0)).save(tmp_path / 'images/coco/a.jpg')
    return tmp_path


def build(folder, records, name='mix.json', **kwargs):
    text = json.dumps(records)
    if name.endswith('l'):
        text = '\n'.join(json.dumps(record) for record in records)
    (folder / name).write_text(text)
    return ConversationDataset(str(folder / name), str(folder / 'images'), **kwargs)


GOOD = record('g1', '<image>\nWhat is it?\nA. cup', 'A red field.', 'Sure?', 'Yes [SEG].')


@pytest.mark.parametrize('name', ['mix.json', 'mix.jsonl'])
def test_turns_without_markers_and_no_region(folder, name):
    records = [record('g0', 'Look <image>', 'Red<|end|>'), GOOD]
    for _ in range(2):
        data = build(folder, records, name)
        samples = [data.load(i, None)[0] for i in (0, 1)]
        assert [s.name for s in samples] == ['conversations/g0', 'conversations/g1']
        assert samples[0].conversation == (('Look', 'Red'),)
        assert samples[1].conversation == (
            ('What is it?\nA. cup', 'A red field.'),
            ('Sure?', 'Yes .'),
        )
        assert samples[1].mask.shape == (0, 30, 40)
        assert samples[1].image.shape == (30, 40, 3)
    assert len(build(folder, records, name, max_turns=1).read(1, None).conversation) == 1
    # A data set without transforms gives the samples themselves.
    assert build(folder, records, name)[1]['sample'].name == 'conversations/g1'


def test_they_share_a_batch_with_regions(folder):
    transform = Sa2VATransform(image_size=28, grounding_size=32)
    item = build(folder, [GOOD], transforms=transform)[0]
    region = Photographs(transforms=transform)[0]
    batch = sa2va_collate([region, item])
    data = batch['data']
    assert data['conversations'][0] is None
    assert data['conversations'][1][1] == ('Sure?', 'Yes .')
    assert data['captions'][1] is None
    assert data['masks'][1].shape == (0, 30, 40)
    assert data['prompt_masks'][1].shape == (0, 1, 1)
    assert data['prompt_masks'][1].dtype == torch.bool
    assert data['pixel_values'][1].shape == (1, 3, 28, 28)
    assert batch['data_samples'][1].name == 'conversations/g1'


def test_no_region_and_no_conversation_is_bad():
    sample = RegionSample(np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4), bool))
    with pytest.raises(BadRecord, match='empty_mask'):
        Sa2VATransform(image_size=28, grounding_size=32)(sample)


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        (record('b', 'Only a question'), 'bad_conversation'),
        (record('b', 'Why?', '<image>'), 'bad_conversation'),
        (record('b', 'Why?', None), 'bad_conversation'),
        (record('b', 'Why?', 'So.', image=['a']), 'bad_conversation'),
        ({'id': 'b', 'image': 'coco/a.jpg', 'conversations': None}, 'bad_conversation'),
        ({'id': 'b', 'image': 'coco/a.jpg', 'conversations': ['x', 'y']}, 'bad_conversation'),
        (record('b', 'Why?', 'So.', image='gone.jpg'), 'missing_image'),
        (record('b', 'Why?', 'So.', image='../mix.json'), 'unsafe_path'),
    ],
)
def test_bad_records_are_counted_and_replaced(folder, bad, reason):
    data = build(folder, [bad, GOOD], transforms=Sa2VATransform(image_size=28, grounding_size=32))
    item = data[0]
    assert item['meta'].sample_id == 'g1'
    assert set(item['skipped']) == {('conversations', 'b', reason)}


def test_records_without_an_image_are_left_out(folder):
    text_only = {'id': 't', 'conversations': GOOD['conversations']}
    assert len(build(folder, [text_only, GOOD, text_only])) == 1
    with pytest.raises(ValueError, match='none of 2 records has an image'):
        build(folder, [text_only, text_only])


def test_files_that_hold_something_else_are_refused(folder):
    with pytest.raises(FileNotFoundError, match='ann_file'):
        ConversationDataset(str(folder / 'gone.json'), str(folder))
    with pytest.raises(ValueError, match='no list of records'):
        build(folder, {'a': 1})
    (folder / 'cut.json').write_text('[{"id": ')
    with pytest.raises(ValueError, match='no JSON'):
        ConversationDataset(str(folder / 'cut.json'), str(folder))
