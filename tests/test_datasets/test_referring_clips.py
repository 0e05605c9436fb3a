"""Expressions in clips as records to train on: which frames are drawn, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import (
    BadRecord,
    MeViSDataset,
    ReferringClipDataset,
    RefYouTubeVOSDataset,
)
from projects.llava_sam2_rl.datasets.referring_clips import draw_frames
from test_datasets.clips import HEIGHT, WIDTH, Clips, box, pictures

LEFT, RIGHT, NONE = box(2), box(20), np.zeros((HEIGHT, WIDTH), bool)


@pytest.fixture
def mevis(tmp_path, monkeypatch):
    """A video of eight frames; the left box begins late, the right one is in one frame."""
    from test_datasets import clips

    layout = ('train/meta_expressions.json', 'train/JPEGImages', 'train/mask_dict.json')
    monkeypatch.setitem(clips.LAYOUTS, 'mevis_train', layout)
    made = Clips(tmp_path / 'data', 'mevis_train')
    made.object(7, [NONE, NONE, *[LEFT] * 6])
    made.object(8, [NONE] * 3 + [RIGHT] + [NONE] * 4)
    made.object(9, [NONE] * 8)
    made.video(
        'v1',
        pictures(8),
        {
            '0': {'exp': 'the left box.', 'anno_id': [7]},
            '1': {'exp': 'which box is there for a moment?', 'anno_id': [8]},
            '2': {'exp': 'a ghost', 'anno_id': [9]},
            '3': {'exp': 'an elephant', 'anno_id': []},
            '4': {'exp': 'lost', 'anno_id': [77]},
        },
    )
    return made.write()


def test_five_frames_of_which_the_first_and_a_later_one_show_the_object(mevis):
    data = ReferringClipDataset(MeViSDataset(mevis, split='train'))
    assert len(data) == 5
    assert data.image_key(0) == 'v1'
    seen = Counter()
    for seed in range(40):
        sample = data.read(0, np.random.default_rng(seed))
        assert sample.name == 'mevis_train/v1/0'
        assert sample.caption == 'the left box.'
        assert len(sample.frames) == 5
        # Frame t of the video is filled with 20 t.
        numbers = [round(float(image.mean()) / 20) for image, _ in sample.frames]
        assert numbers == sorted(set(numbers))
        assert min(numbers) >= 2
        assert all(np.array_equal(mask, LEFT) for _, mask in sample.frames)
        seen.update(numbers)
    assert set(seen) == set(range(2, 8))
    # Of a frame alone there is nothing to be looked for again.
    once = data.read(1, np.random.default_rng(0))
    assert round(float(once.image.mean()) / 20) == 3
    assert np.array_equal(once.mask, RIGHT)
    assert not any(mask.any() for _, mask in once.frames[1:])


def test_what_cannot_be_trained_on_is_counted(mevis):
    data = ReferringClipDataset(dict(type='MeViSDataset', data_root=mevis, split='train'))
    for index, reason in ((2, 'empty_mask'), (3, 'empty_mask'), (4, 'missing_annotation')):
        with pytest.raises(BadRecord, match=reason):
            data.read(index, np.random.default_rng(0))


def test_frames_are_drawn_without_repeats_from_where_the_object_is():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        length = int(rng.integers(1, 12))
        shown = sorted(rng.permutation(length)[: rng.integers(1, length + 1)].tolist())
        count = int(rng.integers(1, 7))
        drawn = draw_frames(length, shown, count, rng)
        assert drawn == sorted(set(drawn))
        assert drawn[0] in shown
        assert len(drawn) <= count
        assert len(drawn) == min(count, length - drawn[0]) or drawn[0] > shown[0]
        if len(shown) > 1 and count > 1:
            assert set(drawn[1:]) & set(shown)
        assert set(drawn) <= set(range(length))


def test_what_takes_the_place_of_a_frame_that_does_not_do():
    """The nearest one before the first; for the last any later one, each as often."""
    firsts = Counter(draw_frames(10, [0, 4, 9], 1, np.random.default_rng(s))[0] for s in range(200))
    # Four of ten frames lie before the fifth.
    assert set(firsts) == {0, 4}
    assert 50 < firsts[0] < 110
    lasts = Counter(
        draw_frames(100, [0, 98, 99], 2, np.random.default_rng(s))[1] for s in range(200)
    )
    assert set(lasts) == {98, 99}
    assert min(lasts.values()) > 60


def test_the_training_set_of_ref_youtube_vos_numbers_expressions_as_listed(tmp_path, monkeypatch):
    from test_datasets import clips

    layout = ('meta_expressions/train/meta_expressions.json', 'train/JPEGImages', 'mask_dict.pkl')
    monkeypatch.setitem(clips.LAYOUTS, 'rvos_train', layout)
    made = Clips(tmp_path / 'rvos', 'rvos_train')
    # The later name is listed first: by name its masks would be the others'.
    made.video('zebra', pictures(2), {'0': {'exp': 'left'}})
    made.video('ant', pictures(2), {'0': {'exp': 'right'}})
    made.object(0, [LEFT] * 2)
    made.object(1, [RIGHT] * 2)
    data = ReferringClipDataset(RefYouTubeVOSDataset(made.write(), split='train'))
    found = {
        sample.caption: sample.mask
        for sample in (data.read(i, np.random.default_rng(0)) for i in range(2))
    }
    assert np.array_equal(found['left'], LEFT)
    assert np.array_equal(found['right'], RIGHT)


def test_what_is_no_such_set_is_refused(mevis, tmp_path):
    made = Clips(tmp_path / 'valid', 'mevis')
    made.video('v1', pictures(2), {'0': {'exp': 'a box', 'anno_id': [1]}})
    root = made.write()
    with pytest.raises(ValueError, match="no masks to train on.*split='train'"):
        ReferringClipDataset(MeViSDataset(root, split='valid'))
    with pytest.raises(TypeError, match='not a Photographs'):
        ReferringClipDataset(dict(type='Photographs'))
    with pytest.raises(ValueError, match='num_frames must be at least 1'):
        ReferringClipDataset(MeViSDataset(mevis, split='train'), num_frames=0)
    with pytest.raises(ValueError, match="numbered is 'by_name', 'as_listed' or None: True"):
        MeViSDataset(mevis, split='train', numbered=True)


def test_what_is_taken_out_of_an_expression_is_counted(mevis, tmp_path):
    import json

    path = tmp_path / 'data/train/meta_expressions.json'
    content = json.loads(path.read_text())
    said = content['videos']['v1']['expressions']['0']
    said['exp'] = 'the [SEG] left  box'
    path.write_text(json.dumps(content))
    data = ReferringClipDataset(MeViSDataset(mevis, split='train'))
    item = data[0]
    assert '[SEG]' not in item['sample'].caption
    assert item['sample'].caption.split() == ['the', 'left', 'box']
    assert [(source, name) for source, name, _ in item['changed']] == [('mevis_train', 'v1/0')]
    # Two thousand words end behind the last sentence that fits; one sentence of them is no caption.
    said['exp'] = 'The left box. ' * 600
    content['videos']['v1']['expressions']['1']['exp'] = 'word ' * 2000
    path.write_text(json.dumps(content))
    data = ReferringClipDataset(MeViSDataset(mevis, split='train'))
    assert data[0]['sample'].caption.endswith('box.')
    assert len(data[0]['sample'].caption) < 600 * 14
    with pytest.raises(BadRecord, match='long_caption'):
        data.make_item(1, np.random.default_rng(0))
