import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from PIL import Image

from projects.llava_sam2_rl.datasets import BadRecord, DescribeAnythingDataset
from projects.llava_sam2_rl.registry import DATASETS
from test_datasets.alignment import check_aligned
from test_datasets.test_grasp_any_region import CUP, HEIGHT, WIDTH, box, chat, png, rle
from test_datasets.test_tar_members import write_tar

RNG = np.random.default_rng(0)
NOTHING = np.zeros((HEIGHT, WIDTH), bool)
disable_progress_bars()


def region(key='7', number=0, **changes):
    return {
        'img_id': key,
        'ann_id': number,
        'caption': f'object {number} of {key}',
        'category': 'cup',
        'mask_rle': rle(CUP),
        'image': f'{key}.jpg',
        'tar_file': '00000000.tar',
        **changes,
    }


class Split:
    """A split's folder in the extracted shape."""

    def __init__(self, root, name='LVIS'):
        self.root, self.name = root, name
        self.folder = root / name
        (self.folder / 'images').mkdir(parents=True)
        self.members = {}
        self.annotations = {}

    def add(self, key, *regions, colour=(250, 120, 10), as_list=True):
        self.members[f'{key}.jpg'] = png(colour)
        self.members[f'{key}.pickle'] = pickle.dumps(list(regions))
        self.annotations[key] = list(regions) if as_list else regions[0]

    def write(self, annotations=True):
        write_tar(self.folder / 'images' / '00000000.tar', self.members)
        if annotations:
            (self.folder / 'annotations.json').write_text(json.dumps(self.annotations))
        return self

    def open(self, **options):
        return DescribeAnythingDataset(str(self.root), self.name, **options)


@pytest.fixture
def split(tmp_path):
    return Split(tmp_path)


def reason(data, index=0):
    with pytest.raises(BadRecord) as caught:
        data.read(index, RNG)
    assert caught.value.name == f'{data.source}/{data.sample_id(index)}'
    return caught.value.reason


@pytest.mark.parametrize('annotations', [True, False])
def test_an_extracted_split_gives_a_record_per_region(split, annotations):
    split.add('7', region(), region(number=1, mask_rle=rle(box(0, 0, 9, 9))))
    split.add('8', region('8', category=['', 'plate']), colour=(1, 2, 3), as_list=annotations)
    split.write(annotations)
    data = DATASETS.build(
        dict(type='DescribeAnythingDataset', data_root=str(split.root), split='LVIS')
    )
    assert [data.sample_id(i) for i in range(data.num_records)] == ['7/0', '7/1', '8/0']
    first, second, third = (data.read(i, RNG) for i in range(3))
    assert (first.caption, first.category) == ('object 0 of 7', 'cup')
    assert first.distractor == 'object 1 of 7'
    assert np.array_equal(first.mask, CUP)
    assert first.image[0, 0].tolist() == [250, 120, 10]
    assert first.source == 'describe_anything_lvis'
    assert (second.caption, second.mask.sum()) == ('object 1 of 7', 81)
    assert third.image[0, 0].tolist() == [1, 2, 3]
    assert (third.category, third.distractor) == ('plate', None)
    assert sorted(p.name for p in split.root.iterdir()) == ['LVIS']  # nothing unpacked


def test_one_region_without_a_list_and_text_beyond_ascii(split):
    split.add('ä', region('ä', caption='une tasse à café 漢'), as_list=False)
    (split.folder / 'annotations.json').write_text(
        json.dumps(split.annotations, ensure_ascii=False), 'utf-8'
    )
    write_tar(split.folder / 'images' / '00000000.tar', split.members)
    sample = split.open().read(0, RNG)
    assert sample.caption == 'une tasse à café 漢'
    assert sample.sample_id == 'ä/0'


def test_the_archive_that_a_region_names_comes_first(split):
    for name, colour in (('00000000.tar', (1, 1, 1)), ('00000001.tar', (9, 9, 9))):
        write_tar(split.folder / 'images' / name, {'7.jpg': png(colour)})
    split.annotations = {
        '7': [region(tar_file='00000001.tar'), region(tar_file='gone.tar')],
        '000012': region('000012', image='x/000012.jpg', tar_file=None),
    }
    (split.folder / 'annotations.json').write_text(json.dumps(split.annotations))
    data = split.open()
    assert data.read(0, RNG).image[0, 0].tolist() == [9, 9, 9]
    assert data.read(1, RNG).image[0, 0].tolist() == [1, 1, 1]
    assert reason(data, 2) == 'missing_image'


def video(split, masks, frames=range(5), key='v.1', annotations=True, **changes):
    entry = region(key, mask_rle=[m if m is None else rle(m) for m in masks], **changes)
    split.members = {f'{key}.{i}.jpg': png((10 * i, 0, 0)) for i in frames}
    split.members[f'{key}.pickle'] = pickle.dumps(entry)
    split.annotations = {key: entry}
    return split.write(annotations)


@pytest.mark.parametrize('annotations', [True, False])
def test_videos_give_pairs_of_frames_that_show_the_object(split, annotations):
    masks = [box(0, 0, 10 + i, 10) for i in range(5)]
    masks[2] = NOTHING
    masks[3] = None
    data = video(split, masks, annotations=annotations).open()
    assert data.num_records == 1
    drawn = set()
    for _ in range(60):
        sample = data.read(0, RNG)
        pair = tuple(int(image[0, 0, 0]) // 10 for image in (sample.image, sample.image2))
        drawn.add(pair)
        assert np.array_equal(sample.mask, masks[pair[0]])
        assert np.array_equal(sample.mask2, masks[pair[1]])
    assert drawn == {(0, 1), (0, 4), (1, 4)}
    narrow = split.open(pair_gap=(2, 3)).read(0, RNG)
    assert (narrow.image2[0, 0, 0] - narrow.image[0, 0, 0]) // 10 == 3


def test_frames_that_are_not_there_are_not_drawn(split):
    masks = [box(0, 0, 10 + i, 10) for i in range(12)]
    data = video(split, masks, frames=(1, 10, 11, 30)).open()
    drawn = {tuple(int(m.sum()) // 10 - 10 for m in (s.mask, s.mask2)) for s in reads(data)}
    assert drawn == {(1, 10), (1, 11), (10, 11)}
    data = video(split, masks, frames=(10,)).open()
    sample = data.read(0, RNG)
    assert (sample.mask.sum(), sample.has_pair) == (200, False)
    data = video(split, [NOTHING] * 3).open()
    assert reason(data) == 'empty_mask'
    assert reason(video(split, [None, None]).open()) == 'missing_mask'
    assert reason(video(split, [CUP], frames=(3,)).open()) == 'missing_mask'
    assert reason(video(split, []).open()) == 'missing_mask'


def reads(data, times=50):
    return [data.read(0, RNG) for _ in range(times)]


def test_one_mask_of_a_video_belongs_to_its_first_frame(split):
    split.members = {f'7.{i}.jpg': png((10 * i, 0, 0)) for i in (2, 0, 1)}
    split.annotations = {'7': region(image='7.0.jpg')}
    sample = split.write().open().read(0, RNG)
    assert sample.image[0, 0].tolist() == [0, 0, 0]
    assert not sample.has_pair


def test_arrow_shards(tmp_path):
    rows = [
        {
            'image': {'bytes': png(), 'path': None},
            'mask_rle': rle(CUP),
            'category': ['cup', 'mug'],
            'image_id': str(i),
            'conversations': chat('<image>\nDescribe.', f'cup {i}', 'more', 'no'),
        }
        for i in range(4)
    ]
    rows[2]['mask_rle'] = None
    Dataset.from_list(rows).save_to_disk(str(tmp_path / 'PACO'), num_shards=2)
    data = DescribeAnythingDataset(str(tmp_path), 'PACO')
    assert [data.read(i, RNG).caption for i in range(len(data))] == ['cup 0', 'cup 1', 'cup 3']
    sample = data.read(2, RNG)
    assert (sample.category, sample.sample_id) == ('cup', 'data-00001-of-00002/1')
    assert np.array_equal(sample.mask, CUP)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'SAV.*annotations\.json.*\.tar.*\.arrow'):
        DescribeAnythingDataset(str(tmp_path))
    split = Split(tmp_path)
    (split.folder / 'annotations.json').write_text('{"7": [')
    with pytest.raises(ValueError, match=r'annotations\.json .* at byte'):
        split.open()


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'image': '../../secret.jpg'}, 'unsafe_path'),
        ({'image': '/etc/passwd'}, 'unsafe_path'),
        ({'tar_file': '../other/00000000.tar'}, 'unsafe_path'),
        ({'mask_rle': None}, 'missing_mask'),
        ({'mask_rle': 'text'}, 'bad_rle'),
        ({'mask_rle': {}}, 'bad_rle'),
        ({'mask_rle': {'size': [HEIGHT, WIDTH], 'counts': [5000]}}, 'bad_rle'),
        ({'mask_rle': {'size': [HEIGHT, WIDTH], 'counts': None}}, 'bad_rle'),
        ({'mask_rle': {'size': [10**8, 10**8], 'counts': [10**16]}}, 'mask_too_large'),
        ({'mask_rle': rle(np.ones((WIDTH, HEIGHT)))}, 'mask_aspect'),
        ({'mask_rle': rle(NOTHING)}, 'empty_mask'),
        ({'caption': 5}, 'bad_caption'),
        ({'caption': 'of <Prompt3>'}, 'bad_prompt_index'),
    ],
)
@pytest.mark.parametrize('annotations', [True, False])
def test_bad_regions_are_bad_records(split, changes, expected, annotations):
    split.add('7', region(**changes))
    assert reason(split.write(annotations).open()) == expected


@pytest.mark.parametrize('value', [None, 3, 'text', [None], [[]]])
def test_what_is_no_region_is_a_bad_record(split, value):
    split.members = {'7.jpg': png()}
    split.annotations = {'7': value}
    assert reason(split.write().open()) == 'bad_annotation'


def test_none_fields_give_no_caption_and_still_a_picture(split):
    split.add(
        '7',
        region(img_id=None, ann_id=None, caption=None, category=None, image=None, tar_file=None),
    )
    sample = split.write().open().read(0, RNG)
    assert (sample.caption, sample.category) == (None, None)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_not_run(split, tmp_path_factory):
    marker = tmp_path_factory.mktemp('marker') / 'executed'
    split.members = {
        '7.jpg': png(),
        '7.pickle': pickle.dumps([region(caption=Payload(str(marker)))]),
        '8.jpg': png(),
        '8.pickle': b'\x80\x04nonsense',
        '9.jpg': png(),
        '9.pickle': b'',
    }
    data = split.write(annotations=False).open()
    assert [reason(data, i) for i in range(len(data))] == ['bad_pickle'] * 3
    assert not marker.exists()


def test_members_that_leave_the_folder_are_counted_and_not_read(split):
    good = pickle.dumps([region()])
    split.members = {
        '../8.jpg': png(),
        '../8.pickle': good,
        '/9.jpg': png(),
        '/9.pickle': good,
        'a.jpg': (tarfile.SYMTYPE, '/etc/passwd'),
        'a.pickle': pickle.dumps([region('a')]),
    }
    data = split.write(annotations=False).open()
    assert [reason(data, i) for i in range(len(data))] == [
        *('unsafe_path', 'unsafe_path', 'missing_image'),
    ]
    assert not (split.folder / '8.jpg').exists()


def test_truncated_and_damaged_archives_are_bad_records(split):
    for key in '789':
        split.add(key, region(key))
    split.write()
    tar = split.folder / 'images' / '00000000.tar'
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 4])
    data = split.open()
    assert data.read(0, RNG).caption == 'object 0 of 7'
    assert reason(data, 2) == 'missing_image'
    tar.write_bytes(b'')
    assert reason(split.open()) == 'missing_image'
    # Cut after the index was made.
    tar.write_bytes(whole)
    data = split.open()
    tar.write_bytes(whole[:700])
    assert reason(data, 2) == 'corrupt_tar'
    damaged = whole.replace(png(), png()[:40] + bytes(len(png()) - 40))
    tar.write_bytes(damaged)
    assert reason(split.open()) == 'corrupt_image'
    tar.unlink()
    assert reason(data, 2) == 'corrupt_tar'


def test_an_epoch_ends_with_bad_records_counted(split):
    for number in range(20):
        split.add(str(number), region(str(number)))
    split.annotations['3'][0]['mask_rle'] = rle(NOTHING)
    split.annotations['9'][0]['image'] = '../x.jpg'
    del split.members['12.jpg']
    items = list(split.write().open())
    assert len(items) == 20
    assert {tuple(s[1:]) for item in items for s in item['skipped']} == {
        ('3/0', 'empty_mask'),
        ('9/0', 'unsafe_path'),
        ('12/0', 'missing_image'),
    }


def test_start_up_reads_the_index_only(split, monkeypatch):
    import projects.llava_sam2_rl.datasets.describe_anything as module

    for number in range(5):
        split.add(str(number), region(str(number)))
    split.write().open()
    monkeypatch.setattr(module, 'iterate_object', None)
    monkeypatch.setattr(module, 'tar_members', None)
    data = split.open()
    assert data.read(4, RNG).caption == 'object 0 of 4'
    assert pickle.loads(pickle.dumps(data)).read(3, RNG).caption == 'object 0 of 3'


def test_a_real_picture_reads_right(shared_dir, split):
    folder = shared_dir / 'realdata' / 'gar_demo'
    with Image.open(folder / 'demo_image_1.png') as picture:
        pixels = np.asarray(picture.convert('RGB'))
    with Image.open(folder / 'demo_mask_1.png') as picture:
        mask = np.asarray(picture.convert('RGB')).any(2)
    split.add('1', region('1', mask_rle=rle(mask)))
    split.members['1.jpg'] = (folder / 'demo_image_1.png').read_bytes()
    check_aligned(split.write().open()[0]['sample'], pixels, mask)
