import os

import numpy as np
import pytest
from own_data import photographs, write_folder
from PIL import Image

from projects.llava_sam2_rl.datasets import FolderRegionDataset


def put(folder, *names, **texts):
    """Pictures, masks (with as many set columns as their number in the call) and texts."""
    for i, name in enumerate(names, 1):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if '.mask' in name:
            mask = np.zeros((20, 30), bool)
            mask[:, :i] = True
            Image.fromarray(mask).save(path)
        else:
            Image.new('RGB', (30, 20), (200, 0, 0)).save(path)
    for name, text in texts.items():
        (folder / name.replace('__', '.')).write_text(text)
    return str(folder)


def captions(data):
    rng = np.random.default_rng(0)
    samples = [data.load(i, rng)[0] for i in range(len(data))]
    return {sample.sample_id: sample.caption for sample in samples}


def test_real_photographs_come_back_as_they_were_written(tmp_path):
    regions = photographs()
    write_folder(tmp_path, regions)
    data = FolderRegionDataset(str(tmp_path / 'photos'))
    names = [f'{name}.mask{i}' for i, (name, _) in enumerate(regions)]
    samples = {item['sample'].sample_id: item['sample'] for item in data}
    assert set(samples) == set(names)
    for name, (_, written) in zip(names, regions, strict=True):
        assert samples[name].caption == written.caption
        assert np.array_equal(samples[name].mask, written.mask)


def test_one_mask_and_its_text(tmp_path):
    place = put(tmp_path, 'dog.jpg', 'dog.mask.png', dog__txt='a dog\n\nsome animal\n')
    data = FolderRegionDataset(place)
    assert len(data) == 1
    assert {data[epoch]['sample'].caption for epoch in range(20)} == {'a dog', 'some animal'}


def test_masks_find_their_texts(tmp_path):
    masks = [f'dog.mask{which}.png' for which in ('', '1', '2', '_left', '.eye', '10')]
    texts = {
        'dog__mask__txt': 'plain',
        'dog1__txt': 'one',
        'dog__mask2__txt': 'two',
        'dog_left__txt': 'left',
        'dog__caption__eye__txt': 'eye',
        'dog__mask10__txt': 'ten',
    }
    data = FolderRegionDataset(put(tmp_path, 'dog.jpg', *masks, **texts))
    assert captions(data) == {
        'dog.mask': 'plain',
        'dog.mask1': 'one',
        'dog.mask2': 'two',
        'dog.mask_left': 'left',
        'dog.mask.eye': 'eye',
        'dog.mask10': 'ten',
    }


def test_a_common_text_has_a_line_for_each_mask_in_their_order(tmp_path):
    masks = ['dog.mask10.png', 'dog.mask2.png']
    place = put(tmp_path, 'dog.jpg', *masks, dog__txt='two\nten\n')
    assert captions(FolderRegionDataset(place)) == {'dog.mask2': 'two', 'dog.mask10': 'ten'}
    (tmp_path / 'dog.txt').write_text('one line for two masks')
    with pytest.raises(RuntimeError, match='caption_count'):
        FolderRegionDataset(place)[0]


def test_names_that_begin_alike_are_told_apart(tmp_path):
    names = ['dog.jpg', 'dog2.jpg', 'dog.mask.png', 'dog2.mask.png', 'a.b.jpg', 'a.b.mask.png']
    place = put(tmp_path, *names, dog__txt='first', dog2__txt='second', a__b__txt='dots')
    assert captions(FolderRegionDataset(place)) == {
        'dog.mask': 'first',
        'dog2.mask': 'second',
        'a.b.mask': 'dots',
    }


def test_texts_are_optional_and_what_is_alone_is_left_out(tmp_path):
    names = [
        'dog.PNG',
        'dog.mask.png',
        'alone.jpg',
        'nobody.mask.png',
        '.hidden.jpg',
        '.hidden.mask.png',
    ]
    data = FolderRegionDataset(put(tmp_path, *names, nobody__txt='x'))
    assert captions(data) == {'dog.mask': None}


def test_folders_below_and_a_folder_of_annotations(tmp_path):
    put(tmp_path / 'photos', 'x/dog.jpg', 'y/dog.jpg')
    put(tmp_path / 'notes', 'x/dog.mask.png', 'y/dog.mask.png')
    (tmp_path / 'notes/y/dog.txt').write_text('the other')
    data = FolderRegionDataset(str(tmp_path / 'photos'), str(tmp_path / 'notes'))
    assert captions(data) == {'x/dog.mask': None, 'y/dog.mask': 'the other'}
    assert [data.image_key(i) for i in range(2)] == ['x/dog.jpg', 'y/dog.jpg']


@pytest.mark.parametrize(
    ('raw', 'reason'),
    [
        ('caf\xe9'.encode('latin-1'), 'bad_encoding'),
        ('a café'.encode('utf-16'), 'bad_encoding'),
        ('a dog'.encode('utf-16-le'), 'bad_encoding'),
    ],
)
def test_a_text_in_another_encoding_is_a_bad_record_with_its_name(tmp_path, raw, reason):
    place = put(tmp_path, 'dog.jpg', 'dog.mask.png', 'cat.jpg', 'cat.mask.png')
    (tmp_path / 'cat.txt').write_bytes(raw)
    (tmp_path / 'dog.txt').write_bytes('\ufeffa dög'.encode())
    item = FolderRegionDataset(place)[0]
    assert set(item['skipped']) == {('folder', 'cat.mask', reason)}
    assert item['sample'].caption == 'a dög'


def test_a_name_that_is_not_utf_8_can_be_told(tmp_path):
    put(tmp_path, 'dog.jpg', 'dog.mask.png')
    for name in ('dog.jpg', 'dog.mask.png'):
        os.rename(tmp_path / name, os.fsencode(tmp_path) + b'/caf\xe9-' + name.encode())
    sample = FolderRegionDataset(str(tmp_path))[0]['sample']
    assert sample.sample_id == 'caf\\udce9-dog.mask'


def test_folders_without_anything_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        FolderRegionDataset(str(tmp_path / 'gone'))
    put(tmp_path, 'dog.jpg')
    with pytest.raises(FileNotFoundError, match=r'has 1 pictures and .* 0 masks.*NAME\.mask1\.png'):
        FolderRegionDataset(str(tmp_path))
