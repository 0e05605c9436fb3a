import pickle

import numpy as np
import pytest
from own_data import outlines, photographs, rle, write_hugging_face, write_parquet
from PIL import Image

from projects.llava_sam2_rl.datasets import HuggingFaceRegionDataset

COLUMNS = {'image': 'photo', 'mask': 'segmentation_mask', 'caption': 'text'}
MASK = np.zeros((20, 30), bool)
MASK[2:9, 3:20] = True


@pytest.fixture(scope='module')
def hf():
    import datasets

    return datasets


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, hf):
    monkeypatch.setattr(hf.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


@pytest.mark.parametrize(('write', 'place'), [(write_hugging_face, 'saved'), (write_parquet, '')])
def test_real_photographs_come_back_as_they_were_written(tmp_path, write, place):
    regions = photographs()[:6]
    write(tmp_path, regions)
    data = HuggingFaceRegionDataset(str(tmp_path / place), **COLUMNS)
    data = pickle.loads(pickle.dumps(data))  # as a spawned worker gets it
    assert len(data) == 6
    for i, (_, written) in enumerate(regions):
        sample = data[i]['sample']
        assert np.array_equal(sample.image, written.image)  # PNG inside
        assert np.array_equal(sample.mask, written.mask)
        assert (sample.caption, sample.sample_id) == (written.caption, str(i))


def save(hf, folder, **columns):
    hf.Dataset.from_dict(columns).save_to_disk(str(folder))
    return str(folder)


def test_masks_as_codes_outlines_and_files(hf, tmp_path):
    Image.new('RGB', (30, 20), (200, 0, 0)).save(tmp_path / 'a.png')
    Image.fromarray(MASK).save(tmp_path / 'm.png')
    for name, mask in {'c': rle(MASK), 'o': outlines(MASK), 'f': 'm.png'}.items():
        place = save(hf, tmp_path / name, image=['a.png'], mask=[mask], label=['box'])
        data = HuggingFaceRegionDataset(
            place, caption=None, category='label', file_dir=str(tmp_path)
        )
        sample = data[0]['sample']
        assert (sample.caption, sample.category) == (None, 'box')
        assert sample.mask.sum() == pytest.approx(MASK.sum(), rel=0.3)
        assert np.array_equal(sample.mask, MASK) or name == 'o'


def test_pairs_bad_rows_and_several_captions(hf, tmp_path):
    Image.new('RGB', (30, 20), (200, 0, 0)).save(tmp_path / 'a.png')
    place = save(
        hf,
        tmp_path / 'd',
        image=['a.png'] * 4 + [None],
        mask=[rle(MASK)] * 3 + [None, rle(MASK)],
        caption=[['one', 'two'], [], ['x'], ['y'], ['z']],
        later=['a.png', None, 'a.png', None, None],
        later_mask=[rle(MASK), None, None, None, None],
    )
    data = HuggingFaceRegionDataset(
        place, image2='later', mask2='later_mask', file_dir=str(tmp_path)
    )
    assert [data[i]['sample'].has_pair for i in range(2)] == [True, False]
    assert {data[epoch * 5]['sample'].caption for epoch in range(20)} == {'one', 'two'}
    assert data[1]['sample'].caption is None
    reasons = {item['skipped'][0][1:] for item in (data[2], data[3], data[4])}
    assert reasons == {('2', 'bad_pair'), ('3', 'missing_mask'), ('4', 'missing_image')}


def test_rows_with_the_same_picture_are_held_out_together(hf, tmp_path):
    write_hugging_face(tmp_path, photographs())
    names = [name for name, _ in photographs()]
    parts = [
        HuggingFaceRegionDataset(str(tmp_path / 'saved'), part=part, val_share=0.4, **COLUMNS)
        for part in ('train', 'val')
    ]
    found = [{names[int(item['sample'].sample_id)] for item in data} for data in parts]
    assert found[0].isdisjoint(found[1])
    assert found[0] | found[1] == set(names)


def test_splits(hf, tmp_path):
    table = hf.Dataset.from_dict({'image': ['a'], 'mask': ['m'], 'caption': ['c']})
    hf.DatasetDict(train=table, test=table).save_to_disk(str(tmp_path / 'two'))
    assert len(HuggingFaceRegionDataset(str(tmp_path / 'two'), split='test')) == 1
    with pytest.raises(ValueError, match="has the splits 'train', 'test', split is None"):
        HuggingFaceRegionDataset(str(tmp_path / 'two'))
    table.save_to_disk(str(tmp_path / 'one'))
    with pytest.raises(ValueError, match="has no splits, split is 'test'"):
        HuggingFaceRegionDataset(str(tmp_path / 'one'), split='test')


def test_what_cannot_be_read_is_refused(hf, tmp_path):
    with pytest.raises(FileNotFoundError, match='neither a parquet file'):
        HuggingFaceRegionDataset(str(tmp_path))
    place = save(hf, tmp_path / 'd', image=['a'], mask=['m'])
    with pytest.raises(ValueError, match=r"has no column 'caption', only 'image', 'mask': name"):
        HuggingFaceRegionDataset(place)
    with pytest.raises(ValueError, match='image2 and mask2 together'):
        HuggingFaceRegionDataset(place, image2='image')
    (tmp_path / 'cut.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(ValueError, match=r'cut\.parquet cannot be read'):
        HuggingFaceRegionDataset(str(tmp_path / 'cut.parquet'))
