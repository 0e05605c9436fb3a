"""gRefCOCO: one object, several, or none."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import GRefCOCODataset, Sa2VATransform, sa2va_collate
from test_datasets.test_refcoco import HEIGHT, WIDTH, Layout, box, box_mask, compressed

LEFT, RIGHT = (5, 5, 25, 30), (30, 5, 50, 30)


class GLayout(Layout):
    """As RefCOCO's, but a reference names a list of objects."""

    def objects(self, *boxes, **values):
        """Adds objects; returns their ids."""
        start = 100 + len(self.annotations)
        for i, corners in enumerate(boxes):
            segmentation = corners if isinstance(corners, dict) else [box(*corners)]
            self.annotations.append(
                {
                    **{'id': start + i, 'image_id': 9, 'category_id': 2, 'iscrowd': 0},
                    'segmentation': segmentation,
                    **values,
                }
            )
        return list(range(start, start + len(boxes)))

    def refer(self, ann_id, *sentences, split='train', image_id=9):
        self.refs.append(
            {
                **{'ref_id': len(self.refs), 'ann_id': ann_id, 'image_id': image_id},
                **{'split': split, 'no_target': ann_id == [-1]},
                'sentences': [{'sent_id': i, 'sent': s, 'raw': s} for i, s in enumerate(sentences)],
            }
        )

    def write(self, pickled=False):
        root = super().write('grefcoco')
        folder = self.root / 'grefcoco'
        (folder / 'refs(unc).p').unlink()
        if pickled:
            (folder / 'grefs(unc).p').write_bytes(pickle.dumps(self.refs))
        else:
            (folder / 'grefs(unc).json').write_text(json.dumps(self.refs))
        return root


@pytest.fixture
def layout(tmp_path):
    return GLayout(tmp_path)


@pytest.mark.parametrize('pickled', [False, True])
def test_one_object_several_and_none(layout, pickled):
    one, two = layout.objects(LEFT, RIGHT)
    layout.refer([one], 'the left cup')
    layout.refer([one, two], 'both cups')
    layout.refer([-1], 'the elephant')
    data = GRefCOCODataset(layout.write(pickled))
    samples = [item['sample'] for item in data]
    left, right = box_mask(*LEFT), box_mask(*RIGHT)
    assert [s.caption for s in samples] == ['the left cup', 'both cups', 'the elephant']
    assert np.array_equal(samples[0].mask, left[None])
    assert np.array_equal(samples[1].mask, np.stack([left, right]))
    assert samples[2].mask.shape == (0, HEIGHT, WIDTH)
    assert samples[2].image.shape == (HEIGHT, WIDTH, 3)
    assert [s.category for s in samples] == ['cup', 'cup', None]
    assert all(item['skipped'] == [] for item in data)


def test_crowds_are_left_out(layout):
    (one,) = layout.objects(LEFT)
    (crowd,) = layout.objects(compressed(box_mask(*RIGHT)), iscrowd=1)
    layout.refer([one, crowd], 'the cup and the people')
    layout.refer([crowd], 'the people')
    data = GRefCOCODataset(layout.write())
    assert np.array_equal(data[0]['sample'].mask, box_mask(*LEFT)[None])
    assert data[1]['skipped'][0] == ('grefcoco', '1', 'only_crowds')


def test_the_batch_has_no_mask_and_a_caption_where_nothing_is_meant(layout):
    one, two = layout.objects(LEFT, RIGHT)
    layout.refer([-1], 'the elephant')
    layout.refer([one, two], 'both cups')
    transform = Sa2VATransform(image_size=28, grounding_size=32)
    data = GRefCOCODataset(layout.write(), transforms=transform)
    batch = sa2va_collate(list(data))['data']
    assert [tuple(masks.shape) for masks in batch['masks']] == [
        (0, HEIGHT, WIDTH),
        (2, HEIGHT, WIDTH),
    ]
    assert [len(grid) for grid in batch['prompt_masks']] == [0, 2]
    assert batch['captions'] == ['the elephant', 'both cups']
    assert batch['conversations'] == batch['region_captions'] == [None, None]
    assert batch['skipped'] == []


def test_without_its_text_a_record_of_nothing_is_bad(layout):
    layout.refer([-1], 'the elephant')
    layout.refer(layout.objects(LEFT), 'the cup')
    data = GRefCOCODataset(layout.write(), withhold_captions=True)
    assert set(data[0]['skipped']) == {('grefcoco', '0', 'empty_mask')}


def test_expressions_without_an_object_can_be_left_out(layout):
    layout.refer([-1], 'the elephant')
    layout.refer(layout.objects(LEFT), 'the cup')
    data = GRefCOCODataset(layout.write(), no_target=False)
    assert [item['sample'].caption for item in data] == ['the cup']


def test_an_evaluation_gets_every_sentence_of_its_split_once(layout):
    ids = layout.objects(LEFT, RIGHT)
    layout.refer(ids, 'one', 'two', split='val')
    layout.refer([-1], 'three', split='val')
    layout.refer(ids, 'not in this split', split='testA')
    data = GRefCOCODataset(layout.write(), split='val', per_sentence=True)
    assert [item['sample'].caption for item in data] == ['one', 'two', 'three']
    assert [item['sample'].sample_id for item in data] == ['0-0', '0-1', '1-0']


def test_bad_records_are_counted_and_replaced(layout):
    (good,) = layout.objects(LEFT)
    layout.refer([good], 'the good one')
    layout.refer([good], '', ' . ')
    layout.refer([-1], 'nothing here', image_id=10)
    (broken,) = layout.objects({'size': [HEIGHT, WIDTH], 'counts': 'zzz'})
    layout.refer([good, broken], 'one of them is broken')
    data = GRefCOCODataset(layout.write())
    reasons = [data[i]['skipped'][0][2] for i in (1, 2, 3)]
    assert reasons == ['empty_expression', 'missing_image', 'bad_rle']


@pytest.mark.parametrize('ann_id', [[], [-1, 100], ['100'], None])
def test_an_ann_id_that_says_neither_is_refused(layout, ann_id):
    layout.objects(LEFT)
    layout.refer(ann_id, 'the cup')
    with pytest.raises(ValueError, match=r'ann_id of ref_id 0 is .*\[-1\] where the expression'):
        GRefCOCODataset(layout.write())


def test_files_that_do_not_belong_together_are_refused(layout):
    (one,) = layout.objects(LEFT)
    layout.refer([one, 999], 'the cup')
    with pytest.raises(ValueError, match=r'1 of 1 references.*instances\.json.*ref_id 0'):
        GRefCOCODataset(layout.write())
    layout.refs[0]['ann_id'] = [one]
    layout.annotations[0]['image_id'] = 10
    with pytest.raises(ValueError, match='of another image'):
        GRefCOCODataset(layout.write())


def test_missing_files_and_unknown_splits_are_named(layout):
    layout.refer([-1], 'the elephant')
    root = layout.write()
    with pytest.raises(ValueError, match="'testA', 'testB'.*not 'test'"):
        GRefCOCODataset(root, split='test')
    with pytest.raises(ValueError, match="no reference of the split 'val'"):
        GRefCOCODataset(root, split='val')
    (layout.root / 'grefcoco/grefs(unc).json').unlink()
    with pytest.raises(FileNotFoundError, match=r'grefs\(unc\)\.json.*gRefCOCO'):
        GRefCOCODataset(root)


def test_a_seg_for_each_object_is_an_option(layout):
    one, two = layout.objects(LEFT, RIGHT)
    layout.refer([one], 'the left cup')
    layout.refer([one, two], 'both cups')
    layout.refer([-1], 'the elephant')
    root = layout.write()
    default = [item['sample'].seg_per_region for item in GRefCOCODataset(root)]
    option = [item['sample'].seg_per_region for item in GRefCOCODataset(root, seg_per_object=True)]
    assert default == [False] * 3
    assert option == [False, True, False]
