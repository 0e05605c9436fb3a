"""Records: what a sample of several frames is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from projects.llava_sam2_rl.structures import RegionSample


def frames(count, shown, shape=(6, 8)):
    """``count`` frames, each of one grey value; the mask of those of ``shown`` has a pixel."""
    images = [np.full((*shape, 3), t, np.uint8) for t in range(count)]
    masks = [np.zeros(shape, bool) for _ in range(count)]
    for t in shown:
        masks[t][0, 0] = True
    return images, masks


def clip(count, shown, **fields):
    return RegionSample.of_clip(*frames(count, shown), source='set', sample_id='1', **fields)


def test_an_image_a_pair_and_a_clip_are_one_record():
    for count in (1, 2, 4):
        sample = clip(count, range(count), caption='a dot')
        assert [int(image[0, 0, 0]) for image, _ in sample.frames] == list(range(count))
        assert sample.has_pair is (count > 1)
        assert sample.caption == 'a dot'
    images, masks = frames(2, [0, 1])
    pair = RegionSample(images[0], masks[0], image2=images[1], mask2=masks[1])
    assert pair.frames[1][0] is images[1]
    assert pair.later_frame == 1
    # Made anew with other texts, a clip keeps its frames.
    assert len(dataclasses.replace(clip(4, [0, 1]), caption=None).frames) == 4


@pytest.mark.parametrize(
    ('shown', 'later'), [([0], None), ([0, 1], 1), ([0, 1, 2], 2), ([0, 1, 3], 3), ([3], 3)]
)
def test_the_object_is_looked_for_in_the_last_frame_that_shows_it(shown, later):
    assert clip(4, shown).later_frame == later


def test_a_frame_counts_that_shows_every_region():
    images, masks = frames(3, [0, 1, 2])
    both = [np.stack([mask, mask]) for mask in masks]
    both[2][1] = False
    assert RegionSample.of_clip(images, both).later_frame == 1


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(more_masks=()), '2 more_images but 0 more_masks'),
        (dict(image2=None, mask2=None), 'behind image2'),
        (dict(mask2=None), 'come together'),
        (dict(more_masks=(np.ones((6, 8), bool), np.ones((6, 7), bool))), 'mask4 is'),
        (dict(more_masks=(np.ones((2, 6, 8), bool),) * 2), 'mask and mask3'),
    ],
)
def test_what_is_no_clip_is_refused(change, message):
    with pytest.raises(ValueError, match=f'set/1: .*{message}'):
        dataclasses.replace(clip(4, range(4)), **change)
