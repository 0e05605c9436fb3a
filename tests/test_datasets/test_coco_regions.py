import json

import numpy as np
import pytest
from own_data import photographs, rle, write_coco
from PIL import Image

from projects.llava_sam2_rl.datasets import COCORegionDataset

POLYGON = [[2, 2, 12, 2, 12, 9, 2, 9]]


def write(folder, annotations, **more):
    Image.new('RGB', (30, 20), (200, 0, 0)).save(folder / 'a.png')
    images = [{'id': 1, 'file_name': 'a.png', 'height': 20, 'width': 30}]
    data = {'images': images, 'annotations': annotations, 'categories': [{'id': 3, 'name': 'box'}]}
    (folder / 'ann.json').write_text(json.dumps({**data, **more}))
    return str(folder / 'ann.json'), str(folder)


def annotation(key=7, **more):
    return {'id': key, 'image_id': 1, 'category_id': 3, 'segmentation': POLYGON, **more}


def captions(data):
    return {
        s.sample_id: s.caption
        for s in (data.load(i, np.random.default_rng(0))[0] for i in range(len(data)))
    }


def test_real_photographs_with_captions_by_annotation_id(tmp_path):
    regions = photographs()
    write_coco(tmp_path, regions)
    data = COCORegionDataset(
        *(str(tmp_path / name) for name in ('instances.json', 'photos', 'captions.csv'))
    )
    assert len(data) == len(regions)
    assert captions(data) == {str(100 + i): s.caption for i, (_, s) in enumerate(regions)}
    masks = [data[i]['sample'].mask for i in range(len(data))]
    for i in range(1, len(regions), 2):
        assert np.array_equal(masks[i], regions[i][1].mask)


def test_captions_are_found_beside_the_annotations_and_in_them(tmp_path):
    place = write(tmp_path, [annotation(7), annotation(8, caption='own')])
    assert captions(COCORegionDataset(*place)) == {'7': None, '8': 'own'}
    rows = [{'annotation_id': 7, 'caption': 'a'}, {'annotation_id': 8, 'caption': 'b'}]
    for beside in (rows, {'7': 'a', '8': 'b'}):
        place = write(tmp_path, [annotation(7), annotation(8, caption='own')], captions=beside)
        assert captions(COCORegionDataset(*place)) == {'7': 'a', '8': 'b'}


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('c.csv', 'ann_id,caption\n7,"one, two"\n8,b\n'),
        ('c.csv', '\ufeffid,category,text\r\n7,x,"one, two"\r\n8,x,b\r\n'),
        ('c.tsv', 'annotation_id\tdescription\n7\tone, two\n8\tb\n'),
        ('c.jsonl', '{"id": 7, "caption": "one, two"}\n{"id": "8", "caption": ["b"]}\n'),
        ('c.json', '[{"id": 7, "caption": "one, two"}, {"id": 8, "caption": "b"}]'),
    ],
)
def test_captions_in_a_file_of_their_own(tmp_path, name, text):
    place = write(tmp_path, [annotation(7, caption='no'), annotation(8)])
    (tmp_path / name).write_text(text)
    data = COCORegionDataset(*place, captions=str(tmp_path / name))
    assert captions(data) == {'7': 'one, two', '8': 'b'}


def test_one_of_several_captions_is_drawn_each_time(tmp_path):
    place = write(tmp_path, [annotation(7)])
    (tmp_path / 'c.csv').write_text('id,caption\n7,one\n7,two\n')
    data = COCORegionDataset(*place, captions=str(tmp_path / 'c.csv'))
    assert {data[epoch]['sample'].caption for epoch in range(20)} == {'one', 'two'}


def test_a_caption_in_another_encoding_is_a_bad_record_with_its_name(tmp_path):
    place = write(tmp_path, [annotation(7), annotation(8)])
    (tmp_path / 'c.csv').write_bytes(b'id,caption\n7,caf\xe9\n8,cafe\n')
    data = COCORegionDataset(*place, captions=str(tmp_path / 'c.csv'))
    assert data[0]['skipped'] == [('coco_regions', '7', 'bad_encoding')] * len(data[0]['skipped'])
    assert data[0]['skipped']
    assert data[0]['sample'].caption == 'cafe'


def test_crowds_are_left_out(tmp_path):
    crowd = annotation(8, iscrowd=1, segmentation=rle(np.ones((20, 30), bool)))
    place = write(tmp_path, [annotation(7), crowd])
    assert len(COCORegionDataset(*place)) == 1
    data = COCORegionDataset(*place, crowds=True)
    assert data[1]['sample'].mask.all()
    assert data[1]['sample'].category == 'box'


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        (annotation(7, image_id=9), 'missing_image'),
        (annotation(7, segmentation=None), 'bad_segmentation'),
        (annotation(7, segmentation=[[1, 2]]), 'bad_polygon'),
        (annotation(7, segmentation=[]), 'empty_mask'),
        (annotation(7, caption=[3]), 'bad_caption'),
    ],
)
def test_bad_objects_are_counted_and_replaced(tmp_path, bad, reason):
    data = COCORegionDataset(*write(tmp_path, [bad, annotation(8)]))
    item = data[0]
    assert item['sample'].sample_id == '8'
    assert set(item['skipped']) == {('coco_regions', '7', reason)}


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='ann_file is COCO'):
        COCORegionDataset(str(tmp_path / 'gone.json'), str(tmp_path))
    place = write(tmp_path, [annotation(7)])
    with pytest.raises(FileNotFoundError, match='a row with annotation_id'):
        COCORegionDataset(*place, captions=str(tmp_path / 'gone.csv'))
    (tmp_path / 'c.csv').write_text('image,caption\n1,a\n')
    with pytest.raises(
        ValueError, match=r"caption 1 has 'image', 'caption': it needs annotation_id"
    ):
        COCORegionDataset(*place, captions=str(tmp_path / 'c.csv'))
    (tmp_path / 'c.csv').write_text('image_id,id,caption\n1,500,a\n')
    with pytest.raises(ValueError, match="none of 1 captions .*of annotation '500'"):
        COCORegionDataset(*place, captions=str(tmp_path / 'c.csv'))
    (tmp_path / 'c.jsonl').write_text('{')
    with pytest.raises(ValueError, match=r'c\.jsonl, line 1 is no JSON'):
        COCORegionDataset(*place, captions=str(tmp_path / 'c.jsonl'))
    with pytest.raises(ValueError, match='describe whole images; take the one of instances'):
        COCORegionDataset(*write(tmp_path, [{'id': 1, 'image_id': 1, 'caption': 'a street'}]))
    (tmp_path / 'ann.json').write_text('[]')
    with pytest.raises(ValueError, match="needs the lists 'images' and 'annotations'"):
        COCORegionDataset(*place)
    with pytest.raises(ValueError, match='no object that is no crowd'):
        COCORegionDataset(*write(tmp_path, [annotation(iscrowd=1)]))
