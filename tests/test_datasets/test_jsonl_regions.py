import json

import numpy as np
import pytest
from own_data import photographs, rle, write_jsonl
from PIL import Image

from projects.llava_sam2_rl.datasets import JSONLRegionDataset

POLYGON = [2, 2, 12, 2, 12, 9, 2, 9]


def build(folder, *lines, name='regions.jsonl', **kwargs):
    Image.new('RGB', (30, 20), (200, 0, 0)).save(folder / 'a.png')
    raw = b'\n'.join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    (folder / name).write_bytes(raw)
    return JSONLRegionDataset(str(folder / name), **kwargs)


def line(**more):
    return {'image': 'a.png', 'mask': POLYGON, 'caption': 'a box', **more}


def test_real_photographs_come_back_as_they_were_written(tmp_path):
    regions = photographs()
    write_jsonl(tmp_path, regions)
    data = JSONLRegionDataset(
        str(tmp_path / 'regions.jsonl'), str(tmp_path / 'photos'), str(tmp_path)
    )
    assert len(data) == len(regions)
    for i, (_, written) in enumerate(regions):
        sample = data[i]['sample']
        assert sample.caption == written.caption
        assert sample.image.shape == written.image.shape
        assert np.abs(sample.image.astype(int) - written.image).mean() < 6  # JPEG
        if i % 3 == 2:  # Polygons lose half a pixel at the rim.
            joined = (sample.mask & written.mask).sum() / (sample.mask | written.mask).sum()
            assert joined > 0.85
        else:
            assert np.array_equal(sample.mask, written.mask)


def test_optional_fields(tmp_path):
    pair = {'image2': 'a.png', 'mask2': rle(np.ones((20, 30), bool))}
    data = build(tmp_path, {'image': 'a.png', 'mask': POLYGON}, line(**pair, category='box'))
    first, second = (item['sample'] for item in data)
    assert (first.caption, first.category, first.has_pair) == (None, None, False)
    assert (second.caption, second.category) == ('a box', 'box')
    assert second.mask2.all()
    assert [s.sample_id for s in (first, second)] == ['1', '2']


def test_one_of_several_captions_is_drawn_each_time(tmp_path):
    data = build(tmp_path, line(caption=['one', 'two']))
    assert {data[epoch]['sample'].caption for epoch in range(20)} == {'one', 'two'}


def test_a_json_list_and_a_byte_order_mark_are_read_too(tmp_path):
    entries = [line(caption='é'), line()]
    data = build(tmp_path, entries, name='list.json')
    assert [item['sample'].caption for item in data] == ['é', 'a box']
    data = build(tmp_path, b'\xef\xbb\xbf' + json.dumps(line()).encode(), b'', b'  ', line())
    assert [item['sample'].sample_id for item in data] == ['1', '4']


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        (b'{"image": "a.png"', 'bad_json'),
        (b'[1]', 'bad_json'),
        (b'[' * 100_000, 'bad_json'),
        (json.dumps(line(caption='caf\xe9'), ensure_ascii=False).encode('latin-1'), 'bad_encoding'),
        (line(image=None), 'missing_image'),
        (line(image=3), 'missing_image'),
        (line(image='gone.png'), 'missing_image'),
        (line(image='../a.png'), 'unsafe_path'),
        (line(image='/etc/passwd'), 'unsafe_path'),
        (line(image='a\0.png'), 'corrupt_image'),
        (line(mask=None), 'missing_mask'),
        (line(mask=[]), 'empty_mask'),
        (line(caption=3), 'bad_caption'),
        (line(image2='a.png'), 'bad_pair'),
        (line(mask2=POLYGON), 'bad_pair'),
        (line(image2='a.png', mask2='gone.png'), 'missing_mask'),
    ],
)
def test_a_bad_line_is_counted_with_its_number_and_replaced(tmp_path, bad, reason):
    data = build(tmp_path, line(), bad)
    item = data[1]
    assert item['sample'].sample_id == '1'
    assert set(item['skipped']) == {('jsonl', '2', reason)}


def test_whole_paths_below_the_folder_are_taken(tmp_path):
    data = build(tmp_path, line(image=str(tmp_path / 'a.png')))
    assert data[0]['skipped'] == []


def test_pictures_are_held_out_whole(tmp_path):
    Image.new('RGB', (30, 20)).save(tmp_path / 'b.png')
    lines = [line(), line(image='b.png'), line(), line(image='b.png')]
    parts = [build(tmp_path, *lines, part=part, val_share=0.5) for part in ('train', 'val')]
    names = [{item['sample'].sample_id for item in data} for data in parts]
    assert sorted(map(sorted, names)) == [['1', '3'], ['2', '4']]


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'"image": …, "mask": …'):
        JSONLRegionDataset(str(tmp_path / 'gone.jsonl'))
    with pytest.raises(ValueError, match='holds no record'):
        build(tmp_path, b'')
    with pytest.raises(ValueError, match='is UTF-16: save it as UTF-8'):
        build(tmp_path, json.dumps(line()).encode('utf-16'))
    with pytest.raises(ValueError, match='is no JSON'):
        build(tmp_path, b'[{"image": 1},', name='list.json')
