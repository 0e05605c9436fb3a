"""Video benchmarks in their layouts, and what is wrong with a record."""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import (
    BadRecord,
    MetaExpressionsDataset,
    MeViSDataset,
    MixedRegionDataset,
    RefDAVIS17Dataset,
    RefSAVDataset,
    RefYouTubeVOSDataset,
    ReVOSDataset,
    clip_collate,
    mask_dictionary,
)
from test_datasets.clips import HEIGHT, WIDTH, Clips, box, code, pictures

LEFT, RIGHT, NONE = box(2), box(20), np.zeros((HEIGHT, WIDTH), bool)


def decoded(codes):
    return [None if c is None else coco_mask.decode(c).astype(bool) for c in codes]


def clips_of(dataset):
    return [item['clip'] for item in dataset]


@pytest.fixture
def mevis(tmp_path):
    """One video of three frames, an object left in all of them and one right in the last."""
    clips = Clips(tmp_path / 'data')
    clips.object(7, [LEFT] * 3)
    clips.object(8, [NONE, NONE, RIGHT])
    clips.video(
        'v1',
        pictures(3),
        {
            '0': {'exp': 'the left  box.', 'anno_id': [7], 'obj_id': [0]},
            '10': {'exp': 'both boxes', 'anno_id': [7, 8]},
            '2': {'exp': 'an elephant', 'anno_id': []},
        },
    )
    return clips


def test_expressions_frames_and_masks(mevis):
    first, both, nothing = clips_of(MeViSDataset(mevis.write()))
    # Ids are sorted as text, frames by their names.
    assert [c.sample_id for c in (first, both, nothing)] == ['v1/0', 'v1/10', 'v1/2']
    assert [path.stem for path in first.frames] == ['00000', '00005', '00010']
    assert (first.height, first.width) == (HEIGHT, WIDTH)
    assert first.caption == 'the left box.'
    assert first.source == 'mevis_valid_u'
    assert all(map(np.array_equal, decoded(first.masks), [LEFT] * 3))
    assert all(map(np.array_equal, decoded(both.masks), [LEFT, LEFT, LEFT | RIGHT]))
    # As officially: no object, nothing to be found.
    assert nothing.masks == (None, None, None)
    assert first.foreground is first.group is None


def test_a_split_whose_masks_are_on_a_server(tmp_path):
    for kind, dataset in (('mevis', MeViSDataset), ('ref_youtube_vos', RefYouTubeVOSDataset)):
        clips = Clips(tmp_path / kind, kind)
        clips.video('v', pictures(2), {'0': {'exp': 'a box'}})
        options = {'split': 'valid'} if kind == 'mevis' else {}
        (clip,) = clips_of(dataset(clips.write(), **options))
        assert clip.masks is None
        assert clip.source == {'mevis': 'mevis_valid'}.get(kind, kind)


def test_davis_counts_its_expressions_over_videos_by_name(tmp_path):
    clips = Clips(tmp_path, 'davis17')
    clips.video('zebra', pictures(1), {'0': {'exp': 'a'}, '1': {'exp': 'b'}})
    clips.video('ant', pictures(1), {'2': {'exp': 'c'}, '10': {'exp': 'd'}})
    masks = [box(left) for left in range(4)]
    for number, mask in enumerate(masks):
        clips.object(number, [mask])
    found = clips_of(RefDAVIS17Dataset(clips.write()))
    assert [c.sample_id for c in found] == ['ant/10', 'ant/2', 'zebra/0', 'zebra/1']
    assert [decoded(c.masks)[0].argmax(axis=1).max() for c in found] == [0, 1, 2, 3]


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    clips = Clips(tmp_path, 'davis17')
    clips.video('v', pictures(1), {'0': {'exp': 'a'}})
    root = clips.write()
    (tmp_path / clips.mask_file).write_bytes(pickle.dumps({'0': print}))
    with pytest.raises(ValueError, match=r'mask_dict\.pkl.*refuses to load'):
        RefDAVIS17Dataset(root)
    (tmp_path / clips.mask_file).write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match=r'mask_dict\.pkl holds a list'):
        RefDAVIS17Dataset(root)


@pytest.mark.parametrize('folder', ['JPEGImages', ''])
def test_revos_has_kinds_and_a_foreground(tmp_path, folder):
    clips = Clips(tmp_path, 'revos')
    clips.image_dir = folder
    clips.object(3, [LEFT, NONE])
    clips.foreground['set/v'] = {'masks_rle': [code(LEFT | RIGHT), code(RIGHT)]}
    clips.video(
        'set/v',
        pictures(2),
        {
            '0': {'exp': 'the box', 'anno_id': [3], 'type_id': 0},
            '1': {'exp': 'What is left?', 'anno_id': [3], 'type_id': 1},
            '2': {'exp': 'a third kind', 'anno_id': [3], 'type_id': 2},
        },
    )
    data = ReVOSDataset(clips.write())
    items = list(data)
    assert [item['clip'].group for item in items[:2]] == ['referring', 'reasoning']
    assert all(map(np.array_equal, decoded(items[0]['clip'].foreground), [LEFT | RIGHT, RIGHT]))
    assert ('revos', 'set/v/2', 'unknown_type') in items[2]['skipped']


def test_ref_sav(tmp_path):
    clips = Clips(tmp_path, 'ref_sav')
    clips.object(3, [LEFT])
    expressions = {str(kind): {'exp': 'a box', 'anno_id': [3], 'type_id': kind} for kind in (0, 1)}
    clips.video('v', pictures(1), expressions)
    assert [c.group for c in clips_of(RefSAVDataset(clips.write()))] == ['long', 'short']


# ------------------------------------------------------------------------------------ bad records


def reason_of(dataset, expression='bad'):
    (number,) = [
        i for i in range(len(dataset)) if dataset.sample_id(i).rpartition('/')[2] == expression
    ]
    reasons = {reason for _, name, reason in dataset[number]['skipped'] if expression in name}
    assert len(reasons) == 1
    return reasons.pop()


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        ({'exp': 'a box', 'obj_id': [0]}, 'no_objects'),
        ({'exp': 'a box', 'anno_id': None}, 'no_objects'),
        ({'exp': 'a box', 'anno_id': [7, 99]}, 'missing_annotation'),
        ({'exp': ' . ', 'anno_id': [7]}, 'empty_expression'),
        ({'exp': '[SEG]<|im_end|>', 'anno_id': [7]}, 'empty_expression'),
        ({'exp': 'word ' * 2000, 'anno_id': [7]}, 'long_caption'),
        ({'anno_id': [7]}, 'bad_expression'),
        ('a box', 'bad_expression'),
        ({'exp': 'a box', 'anno_id': [50]}, 'frame_count'),
        ({'exp': 'a box', 'anno_id': [51]}, 'mask_size'),
        ({'exp': 'a box', 'anno_id': [52]}, 'bad_rle'),
        ({'exp': 'a box', 'anno_id': [53]}, 'bad_annotation'),
    ],
)
def test_a_bad_expression_is_named_and_the_others_go_on(mevis, content, reason):
    mevis.object(50, [LEFT] * 2)
    mevis.object(51, [box(2, columns=WIDTH + 1)] * 3)
    mevis.masks['52'] = [{'size': [HEIGHT, WIDTH], 'counts': 'zzz'}] * 3
    mevis.masks['53'] = {'0': None}
    mevis.videos['v1']['expressions']['bad'] = content
    dataset = MeViSDataset(mevis.write())
    assert reason_of(dataset) == reason
    assert [c.expression for c in clips_of(dataset)][:3] == ['0', '10', '2']


def one_frame_less(clips, folder):
    (folder / '00005.jpg').unlink()


def another_size(clips, folder):
    Image.new('RGB', (WIDTH + 1, HEIGHT)).save(folder / '00005.jpg')


def no_picture(clips, folder):
    (folder / '00005.jpg').write_text('no picture')


def no_folder(clips, folder):
    folder.rename(folder.with_name('elsewhere'))


def no_frames(clips, folder):
    clips.videos[folder.name]['frames'] = []


def out_of_the_folder(clips, folder):
    clips.videos[folder.name]['frames'][0] = '../v1/00000'


@pytest.mark.parametrize(
    ('damage', 'reason'),
    [
        (one_frame_less, 'missing_image'),
        (another_size, 'frame_size'),
        (no_picture, 'corrupt_image'),
        (no_folder, 'missing_video'),
        (no_frames, 'no_frames'),
        (out_of_the_folder, 'unsafe_path'),
    ],
)
def test_a_bad_video_is_named_and_the_others_go_on(mevis, damage, reason):
    folder = mevis.video('v2', pictures(3), {'bad': {'exp': 'a box', 'anno_id': [7]}})
    damage(mevis, folder)
    dataset = MeViSDataset(mevis.write())
    assert reason_of(dataset) == reason
    assert len(list(dataset)) == 4


def test_names_that_leave_the_folder(mevis):
    mevis.videos['v1']['expressions']['../bad'] = {'exp': 'a box', 'anno_id': [7]}
    assert reason_of(MeViSDataset(mevis.write())) == 'unsafe_path'


def test_where_nothing_can_be_used_the_run_stops(mevis):
    mevis.image_dir = 'valid_u'
    root = mevis.write()
    for path in mevis.root.rglob('*.jpg'):
        path.unlink()
    with pytest.raises(RuntimeError, match=r'20 records in a row.*20 x missing_image'):
        MeViSDataset(root)[0]


def test_files_that_are_missing_or_hold_something_else(mevis):
    root = mevis.write()
    with pytest.raises(ValueError, match="'valid_u', 'valid'.*not 'test'"):
        MeViSDataset(root, split='test')
    (mevis.root / 'valid_u/mask_dict.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'mask_dict\.json.*Video benchmarks'):
        MeViSDataset(root)
    mevis.write()
    (mevis.root / mevis.expressions_file).write_text('{"videos": [1]}')
    with pytest.raises(ValueError, match=r'meta_expressions\.json has no "videos"'):
        MeViSDataset(root)
    (mevis.root / mevis.expressions_file).write_text('{"videos": {"v": {"frames": ["0"]}}}')
    with pytest.raises(ValueError, match='holds no expression'):
        MeViSDataset(root)
    mevis.write()
    (mevis.root / 'valid_u/JPEGImages').rename(mevis.root / 'away')
    with pytest.raises(FileNotFoundError, match='JPEGImages is no folder of videos'):
        MeViSDataset(root)


def places(value, way=()):
    """The ways to everything inside a JSON value."""
    if isinstance(value, dict):
        inside = value.items()
    else:
        inside = enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*way, key)
        yield from places(item, (*way, key))


GARBAGE = [None, [], {}, '', 'x', '../x', '\0', '\udcff', -1, 10**12, 1.5, True, [None], [[1]]]


def test_whatever_stands_anywhere_is_refused_at_the_start_or_a_bad_record(tmp_path):
    draw, reasons = random.Random(0), Counter()
    clips = Clips(tmp_path, 'revos')
    clips.object(1, [LEFT] * 2)
    kinds = {str(n): {'exp': 'a box', 'anno_id': [1], 'type_id': n} for n in (0, 1)}
    clips.video('v', pictures(2), kinds)
    clips.foreground['v'] = {'masks_rle': [code(LEFT)] * 2}
    good = clips.videos, clips.masks, clips.foreground
    for _ in range(60):
        clips.videos, clips.masks, clips.foreground = contents = copy.deepcopy(good)
        inside = draw.choice(contents)
        *way, last = draw.choice(list(places(inside)))
        for key in way:
            inside = inside[key]
        inside[last] = draw.choice(GARBAGE)
        try:
            dataset = ReVOSDataset(clips.write())
        except ValueError:
            reasons['start'] += 1
            continue
        for number in range(len(dataset)):
            try:
                dataset.make_item(number, None)
                reasons['fine'] += 1
            except BadRecord as error:
                reasons[error.reason] += 1
    assert {'start', 'fine', 'bad_rle'} < set(reasons)


def test_markup_in_an_expression_becomes_blanks(mevis):
    mevis.videos['v1']['expressions']['0']['exp'] = 'the <image> box'
    item = MeViSDataset(mevis.write())[0]
    assert item['clip'].caption == 'the box'
    assert item['changed'] == [('mevis_valid_u', 'v1/0', 'placeholder')]


def test_the_masks_are_read_one_object_at_a_time(mevis, monkeypatch):
    """A file of hundreds of megabytes is indexed once and held by no worker."""
    root = mevis.write()
    MeViSDataset(root)
    monkeypatch.setattr(mask_dictionary, 'iterate_object', None)
    read, read_value = [], mask_dictionary.read_value

    def watched(path, start, length):
        read.append(read_value(path, start, length))
        return read[-1]

    monkeypatch.setattr(mask_dictionary, 'read_value', watched)
    dataset = MeViSDataset(root)
    assert not read
    assert np.array_equal(decoded(dataset[0]['clip'].masks)[0], LEFT)
    assert read == [mevis.masks['7']]


def test_a_layout_of_ones_own_beside_others(mevis):
    root = mevis.write()
    own = MetaExpressionsDataset(
        'valid_u/meta_expressions.json',
        'valid_u/JPEGImages',
        data_root=root,
        source='own',
        max_samples=2,
    )
    mixed = MixedRegionDataset([MeViSDataset(root), own])
    batch = clip_collate(list(mixed))
    assert [clip.source for clip in batch['data_samples']] == ['mevis_valid_u'] * 3 + ['own'] * 2
    assert batch['data'] == {'skipped': [], 'changed': []}
    assert batch['data_samples'][4].masks is None
