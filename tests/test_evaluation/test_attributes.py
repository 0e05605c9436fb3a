"""What captions name of an object's attributes, counted by hand."""

from __future__ import annotations

import pytest
import torch

from projects.llava_sam2_rl.datasets import GeneratedScenes
from projects.llava_sam2_rl.evaluation import CycleMetric
from projects.llava_sam2_rl.evaluation.attributes import compare_attributes, named_values

OBJECT = {'size': 'small', 'colour': 'red', 'shape': 'circle', 'position': 'top center'}
#: Caption; which of OBJECT it names; how many wrong values of each attribute, in that order.
CASES = [
    ('a small red circle in the top center', 'size colour shape position', (0, 0, 0, 0)),
    ('A small RED circle, in the top center.', 'size colour shape position', (0, 0, 0, 0)),
    ('a circle', 'shape', (0, 0, 0, 0)),
    ('a large red square in the top center', 'colour position', (1, 0, 1, 0)),
    # A cell whose name is a part of another's.
    ('a small red circle in the center', 'size colour shape', (0, 0, 0, 1)),
    ('a circle in the bottom left', 'shape', (0, 0, 0, 1)),
    # Neither half of a cell's name is a cell.
    ('a circle in the top', 'shape', (0, 0, 0, 0)),
    # Both, and two wrong ones; the same one twice counts once.
    ('a red blue green circle', 'colour shape', (0, 2, 0, 0)),
    ('blue blue', '', (0, 1, 0, 0)),
    # Words that only contain one of the words.
    ('a reddish smaller circles', '', (0, 0, 0, 0)),
    ('', '', (0, 0, 0, 0)),
    ('center left top center', 'position', (0, 0, 0, 1)),
]


@pytest.mark.parametrize(('caption', 'right', 'wrong'), CASES)
def test_by_hand(caption, right, wrong):
    found = compare_attributes(caption, OBJECT)
    assert {key for key, x in found.items() if x.right} == set(right.split())
    assert tuple(found[key].num_wrong for key in OBJECT) == wrong


def test_the_longest_value_takes_its_words():
    assert named_values('left of the top left', ('left', 'top left')) == ['left', 'top left']
    assert named_values('top left', ('left', 'top left')) == ['top left']


def test_a_value_that_no_caption_could_name_is_an_error():
    with pytest.raises(ValueError, match="colour='pink' is not in the vocabulary"):
        compare_attributes('a pink circle', {'colour': 'pink'})
    with pytest.raises(ValueError, match="weight='light'"):
        compare_attributes('', {'weight': 'light'})


def test_reference_captions_name_all_and_nothing_else(tiny_transform):
    scenes = GeneratedScenes(length=40, split='val', transforms=tiny_transform)
    for index in range(40):
        meta = scenes[index]['meta']
        found = compare_attributes(meta.caption, meta.attributes)
        assert all(x.right and x.num_wrong == 0 for x in found.values())
        # Another object of the scene differs in something.
        other = compare_attributes(meta.distractor, meta.attributes)
        assert any(x.num_wrong == 1 and not x.right for x in other.values())


def prediction(caption, attributes):
    mask = torch.ones(2, 2, dtype=torch.bool)
    return {
        'caption': caption,
        'reference': None,
        'caption_return': None,
        'gt_mask': mask,
        'target_mask': mask,
        'masks': {'generated': mask},
        'tracks': {},
        'attributes': attributes,
    }


def test_the_metric_takes_means_over_records_that_have_attributes():
    metric = CycleMetric()
    captions = ('a small red circle', 'a large blue circle in the bottom left')
    metric.process(None, [prediction(text, OBJECT) for text in captions])
    metric.process(None, [prediction('a dog', None)])
    found = metric.compute_metrics(metric.results)
    # 3 of 4 and 1 of 4; 0 wrong and 3 wrong.
    assert found['attribute_recall'] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert found['wrong_attributes'] == pytest.approx(3 / 2)
    by_attribute = [found[f'attribute_recall_{key}'] for key in OBJECT]
    assert by_attribute == [0.5, 0.5, 1.0, 0.0]
    assert [found[f'wrong_attributes_{key}'] for key in OBJECT] == [0.5, 0.5, 0.0, 0.5]
    assert found['return_iou'] == 1


def test_without_attributes_there_is_no_such_number():
    metric = CycleMetric()
    metric.process(None, [prediction('a dog', None)])
    assert set(metric.compute_metrics(metric.results)) == {'return_iou'}


def test_prediction_carries_the_attributes(tiny_model, tiny_transform):
    from projects.llava_sam2_rl.datasets import sa2va_collate

    scenes = GeneratedScenes(length=2, split='val', transforms=tiny_transform)
    batch = sa2va_collate([scenes[0], scenes[1]])
    found = tiny_model.predict(**batch)
    assert [x['attributes'] for x in found] == [m.attributes for m in batch['data_samples']]
    assert set(found[0]['attributes']) == {'size', 'colour', 'shape', 'position'}
