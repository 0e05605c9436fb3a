import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import RefCOCODataset, Sa2VATransform, sa2va_collate

HEIGHT, WIDTH = 40, 60


def box(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def box_mask(x0, y0, x1, y1, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def compressed(mask):
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': code['size'], 'counts': code['counts'].decode()}


class Layout:
    """A RefCOCO folder with one image and as many references as are added."""

    def __init__(self, root):
        self.root = root
        self.refs, self.annotations = [], []
        self.images = [{'id': 9, 'file_name': 'COCO_9.jpg', 'height': HEIGHT, 'width': WIDTH}]
        (root / 'train2014').mkdir()
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / 'train2014' / 'COCO_9.jpg')

    def image(self, id, file_name, height=HEIGHT, width=WIDTH):
        self.images.append({'id': id, 'file_name': file_name, 'height': height, 'width': width})

    def add(self, segmentation, *sentences, image_id=9, split='train'):
        ann_id = 100 + len(self.annotations)
        self.annotations.append(
            {'id': ann_id, 'image_id': image_id, 'category_id': 2, 'segmentation': segmentation}
        )
        self.refs.append(
            {
                'ref_id': len(self.refs),
                'ann_id': ann_id,
                'image_id': image_id,
                'category_id': 2,
                'split': split,
                'file_name': 'not_this_one_9_1.jpg',
                'sentences': [{'sent_id': i, 'sent': s, 'raw': s} for i, s in enumerate(sentences)],
            }
        )

    def write(self, dataset='refcoco', split_by='unc'):
        folder = self.root / dataset
        folder.mkdir(exist_ok=True)
        (folder / f'refs({split_by}).p').write_bytes(pickle.dumps(self.refs, protocol=2))
        (folder / 'instances.json').write_text(
            json.dumps(
                {
                    'images': self.images,
                    'annotations': self.annotations,
                    'categories': [{'id': 2, 'name': 'cup'}],
                }
            )
        )
        return str(self.root)


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path)


GOOD = [box(5, 5, 25, 30)]


def test_polygons_and_both_forms_of_rle_give_the_mask(layout):
    two = box_mask(5, 5, 25, 30) | box_mask(20, 10, 50, 35)
    layout.add([box(5, 5, 25, 30), box(20, 10, 50, 35)], 'left and right')
    layout.add(compressed(two), 'compressed')
    flat = two.flatten(order='F')
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    layout.add({'size': [HEIGHT, WIDTH], 'counts': runs}, 'runs')
    data = RefCOCODataset(layout.write())
    assert len(data) == 3
    for i in range(3):
        sample = data[i]['sample']
        assert np.array_equal(sample.mask, two), sample.caption
        assert sample.image.shape == (HEIGHT, WIDTH, 3)
        assert (sample.name, sample.category) == (f'refcoco/{i}', 'cup')
        assert data[i]['skipped'] == []


def test_an_object_in_four_parts_and_a_crowd(layout):
    parts = [(0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30), (8, 8, 22, 22)]
    union = np.any([box_mask(*part) for part in parts], axis=0)
    assert union.sum() == 3 * 100 + 14 * 14 - 2 * 2 * 3  # the last part overlaps three corners
    layout.add([box(*part) for part in parts], 'four parts')
    flat = union.flatten(order='F')
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    runs = [0, *runs] if flat[0] else runs
    layout.add({'size': [HEIGHT, WIDTH], 'counts': runs}, 'the crowd')
    layout.annotations[-1]['iscrowd'] = 1
    data = RefCOCODataset(layout.write())
    for i in range(2):
        assert np.array_equal(data[i]['sample'].mask, union)


@pytest.mark.parametrize(
    ('dataset', 'split_by', 'splits'),
    [
        ('refcoco', 'unc', ('train', 'val', 'testA', 'testB')),
        ('refcoco+', 'unc', ('train', 'val', 'testA', 'testB')),
        ('refcocog', 'umd', ('train', 'val', 'test')),
        ('refcocog', 'google', ('train', 'val')),
    ],
)
def test_every_split_has_its_own_references(layout, dataset, split_by, splits):
    for split in splits:
        layout.add(GOOD, f'the {split} cup', split=split)
    layout.write(dataset, split_by)
    for split in splits:
        data = RefCOCODataset(str(layout.root), dataset, split, split_by)
        assert [item['sample'].caption for item in data] == [f'the {split} cup']


def test_a_sentence_is_chosen_per_index(layout):
    layout.add(GOOD, 'one.', ' two  words', 'three', '')
    data = RefCOCODataset(layout.write())
    captions = [data[index]['sample'].caption for index in range(60)]
    assert set(captions) == {'one.', 'two words', 'three'}
    assert min(captions.count(c) for c in set(captions)) > 8  # 20 expected
    again = RefCOCODataset(layout.write())
    assert [again[index]['sample'].caption for index in range(60)] == captions


def test_another_object_of_the_picture_is_the_distractor(layout):
    layout.add(GOOD, 'a cup')
    data = RefCOCODataset(layout.write())
    assert data[0]['sample'].distractor is None
    layout.add([box(30, 5, 50, 30)], 'a plate', '.', 'the dish')
    layout.image(10, 'COCO_10.jpg')
    layout.add(GOOD, 'elsewhere', image_id=10)
    layout.refs.append({**layout.refs[0], 'ref_id': 7, 'sentences': [{'sent': 'the same cup'}]})
    data = RefCOCODataset(layout.write())
    samples = [data[epoch * len(data)]['sample'] for epoch in range(20)]
    assert {sample.distractor for sample in samples} == {'a plate', 'the dish'}
    assert data[1]['sample'].distractor in ('a cup', 'the same cup')


def test_an_evaluation_gets_every_sentence_once(layout):
    layout.add(GOOD, 'one', 'two', split='val')
    layout.add(GOOD, 'three', split='val')
    layout.add(GOOD, 'not in this split')
    data = RefCOCODataset(layout.write(), split='val', per_sentence=True)
    assert [item['sample'].caption for item in data] == ['one', 'two', 'three']
    assert [item['sample'].sample_id for item in data] == ['0-0', '0-1', '1-0']


def bad_layout(layout, case):
    if case == 'empty_expression':
        layout.add(GOOD, '', ' . ')
    elif case == 'missing_image':
        layout.image(10, 'gone.jpg')
        layout.add(GOOD, 'a cup', image_id=10)
    elif case == 'corrupt_image':
        layout.image(10, 'broken.jpg')
        whole = (layout.root / 'train2014' / 'COCO_9.jpg').read_bytes()
        (layout.root / 'train2014' / 'broken.jpg').write_bytes(whole[: len(whole) // 2])
        layout.add(GOOD, 'a cup', image_id=10)
    elif case == 'unsafe_path':
        layout.image(10, '../train2014/COCO_9.jpg')
        layout.add(GOOD, 'a cup', image_id=10)
    elif case == 'empty_mask':
        layout.add(compressed(np.zeros((HEIGHT, WIDTH), bool)), 'a cup')
    elif case == 'mask_aspect':
        layout.add(compressed(box_mask(5, 5, 25, 30, height=WIDTH, width=HEIGHT)), 'a cup')
    elif case == 'bad_rle':
        layout.add({'size': [HEIGHT, WIDTH], 'counts': 'zzz'}, 'a cup')
    elif case == 'bad_polygon':
        layout.add([[1, 2, 3]], 'a cup')
    elif case == 'bad_segmentation':
        layout.add(None, 'a cup')
    elif case == 'bad_size':
        layout.image(10, 'COCO_9.jpg', None, None)
        layout.add(GOOD, 'a cup', image_id=10)
    elif case == 'mask_too_large':
        layout.image(10, 'COCO_9.jpg', 10**6, 10**6)
        layout.add(GOOD, 'a cup', image_id=10)


@pytest.mark.parametrize(
    'case',
    [
        'empty_expression',
        'missing_image',
        'corrupt_image',
        'unsafe_path',
        'empty_mask',
        'mask_aspect',
        'bad_rle',
        'bad_polygon',
        'bad_segmentation',
        'bad_size',
        'mask_too_large',
    ],
)
def test_bad_records_are_counted_and_replaced(layout, case):
    bad_layout(layout, case)
    layout.add(GOOD, 'the good one')
    data = RefCOCODataset(
        layout.write(), transforms=Sa2VATransform(image_size=28, grounding_size=32)
    )
    item = data[0]
    assert item['meta'].caption == 'the good one'
    assert set(item['skipped']) == {('refcoco', '0', case)}
    assert data[1]['skipped'] == []
    batch = sa2va_collate([item, data[1]])
    assert batch['data']['skipped'] == item['skipped']


def test_a_mask_of_another_size_but_the_same_aspect_is_fitted(layout):
    layout.image(10, 'COCO_9.jpg', HEIGHT // 2, WIDTH // 2)
    layout.add([box(5, 5, 10, 15)], 'a cup', image_id=10)
    sample = RefCOCODataset(layout.write())[0]['sample']
    assert np.array_equal(sample.mask, box_mask(10, 10, 20, 30))


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(layout, tmp_path):
    layout.add(GOOD, 'a cup')
    root = layout.write()
    refs = [*layout.refs, Runs(str(tmp_path / 'made'))]
    (layout.root / 'refcoco' / 'refs(unc).p').write_bytes(pickle.dumps(refs))
    with pytest.raises(pickle.UnpicklingError, match='mkdir'):
        RefCOCODataset(root)
    assert not (tmp_path / 'made').exists()


def test_missing_files_are_named_with_what_to_do(layout):
    layout.add(GOOD, 'a cup')
    root = layout.write()
    with pytest.raises(FileNotFoundError, match=r'refcocog.*refs\(umd\)\.p.*download'):
        RefCOCODataset(root, dataset='refcocog')
    (layout.root / 'refcoco' / 'instances.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'instances\.json'):
        RefCOCODataset(root)


def test_data_sets_and_splits_that_are_not_there_are_refused(layout):
    layout.add(GOOD, 'a cup')
    root = layout.write()
    for options, message in (
        ({'dataset': 'refcoco2'}, 'refcoco2'),
        ({'split': 'test'}, 'testA'),
        ({'split_by': 'umd'}, 'umd'),
        ({'split': 'testB'}, "no reference of the split 'testB'"),
    ):
        with pytest.raises(ValueError, match=message):
            RefCOCODataset(root, **options)
    layout.annotations.clear()
    layout.write()
    with pytest.raises(ValueError, match='1 of 1 references'):
        RefCOCODataset(root)


def test_refcocog_lies_beside_it(layout):
    layout.add(GOOD, 'a cup', split='test')
    layout.write('refcocog', 'umd')
    data = RefCOCODataset(str(layout.root), 'refcocog', 'test', source='g test')
    assert data[0]['sample'].name == 'g test/0'
