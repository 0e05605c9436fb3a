"""Generated clips: what moves, hides, crosses and leaves, and masks that are the visible part."""

from __future__ import annotations

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import (
    GeneratedMovingScenes,
    GeneratedScenes,
    sa2va_collate,
)
from projects.llava_sam2_rl.datasets.moving_scenes import Path
from projects.llava_sam2_rl.datasets.scenes import COLOURS, SIZES

NUM, FRAMES = 60, 5


def frames(scene):
    """T × ``(N, H, W)``."""
    return np.stack([scene.masks, scene.masks2, *scene.more_masks])


@pytest.fixture(scope='module')
def clips():
    data = GeneratedMovingScenes(NUM, num_frames=FRAMES)
    return [data.scene(i) for i in range(NUM)]


def test_a_clip_is_a_function_of_seed_split_and_index(clips):
    again = GeneratedMovingScenes(NUM, num_frames=FRAMES).scene(4)
    for a, b in zip((again.image2, *again.more_images), (clips[4].image2, *clips[4].more_images)):
        assert np.array_equal(a, b)
    assert np.array_equal(frames(again), frames(clips[4]))
    other = GeneratedMovingScenes(NUM, num_frames=FRAMES, seed=1).scene(4)
    assert not np.array_equal(other.image, clips[4].image)


def test_masks_are_what_is_to_be_seen(clips):
    """Masks do not overlap, and show the object's own colour and nothing else of it is left out."""
    for clip in clips[:20]:
        images = [clip.image, clip.image2, *clip.more_images]
        for image, masks in zip(images, frames(clip), strict=True):
            assert masks.sum(0).max() <= 1
            for mask, attributes in zip(masks, clip.attributes):
                # 10 of the object's own shade and 9 of noise beside the named colour.
                off = np.abs(image.astype(int) - COLOURS[attributes['colour']]).max(-1) > 19
                assert not (off & mask).any()
            # Saturated or very bright pixels are of an object: backgrounds are dull.
            spread = image.max(-1).astype(int) - image.min(-1)
            assert not ((spread > 90) & ~masks.any(0)).any()


def test_the_first_frame_shows_every_object_where_its_caption_says(clips):
    for clip in clips:
        for mask, attributes in zip(clip.masks, clip.attributes):
            assert mask.mean() > 0.85 * SIZES[attributes['size']]
            row, column = (np.argwhere(mask).mean(0) / len(mask) * 3).astype(int)
            named = ('top', 'center', 'bottom')[row], ('left', 'center', 'right')[column]
            place = 'center' if named == ('center', 'center') else ' '.join(named)
            assert attributes['position'] == place


def centre(mask):
    return np.argwhere(mask).mean(0) / len(mask)


def test_objects_hide_one_another_cross_and_leave(clips):
    hidden = crossed = left = alike = 0
    for clip in clips:
        masks = frames(clip)
        areas = masks.sum((2, 3)) / masks[0].sum((1, 2))
        left += bool((areas[-1] == 0).any())
        inside = [n for n in range(len(clip.captions)) if areas[-1, n] > 0.95]
        hidden += any((areas[1:-1, n] < 0.7).any() for n in inside)
        if {0, 1} <= set(inside):
            swapped = [np.abs(centre(masks[-1, n]) - centre(masks[0, 1 - n])).max() for n in (0, 1)]
            if max(swapped) < 0.06:
                crossed += 1
                a, b = ({**x, 'position': ''} for x in clip.attributes[:2])
                alike += a == b
    assert min(hidden, crossed, left) > NUM / 5
    assert alike > NUM / 10


def test_nothing_jumps(clips):
    """From frame to frame a whole object moves a part of the picture, along its path."""
    for clip in clips:
        masks = frames(clip)
        whole = masks.sum((2, 3)) > 0.95 * masks[0].sum((1, 2))
        for t in range(1, FRAMES):
            for n in np.flatnonzero(whole[t] & whole[t - 1]):
                assert np.abs(centre(masks[t, n]) - centre(masks[t - 1, n])).max() < 0.75


def test_a_path_goes_through_the_place_it_is_given():
    a, b, place = np.array([0.1, 0.2]), np.array([0.9, 0.4]), np.array([0.3, 0.8])
    path = Path.through(a, b, place, 0.25)
    assert path.at(0.25) == pytest.approx(place)
    assert (path.at(0.0), path.at(1.0)) == (pytest.approx(a), pytest.approx(b))
    # De Casteljau: the middle is the mean of ends and twice the control point.
    assert path.at(0.5) == pytest.approx((a + 2 * path.control + b) / 4)


def test_items_ask_for_what_comes_up_again(tiny_transform):
    data = GeneratedMovingScenes(40, num_frames=3, transforms=tiny_transform)
    items = [data[i] for i in range(40)]
    assert not any(item['skipped'] for item in items)
    assert {item['frame2'] for item in items} == {1, 2}
    assert {len(item['clip']) for item in items} == {1}
    samples = [data.load(i, np.random.default_rng(i))[0] for i in range(40)]
    assert any(not mask.any() for sample in samples for _, mask in sample.frames)


def test_any_number_of_frames(tiny_transform):
    alone = GeneratedMovingScenes(5, num_frames=1, transforms=tiny_transform)[0]
    assert alone['masks2'] is None
    pair = GeneratedMovingScenes(5, num_frames=2, transforms=tiny_transform)[0]
    assert (pair['frame2'], pair['clip']) == (1, [])
    batch = sa2va_collate([alone, pair])['data']
    assert batch['pair']['index'].tolist() == [1]
    with pytest.raises(ValueError, match='num_frames must be at least 1, got 0'):
        GeneratedMovingScenes(5, num_frames=0)


def test_no_combination_of_objects_is_in_two_splits():
    """The first frame is drawn as a scene is, which `test_scenes` looks at."""
    clip = GeneratedMovingScenes(3, num_frames=3, split='val').scene(1)
    assert np.array_equal(clip.masks, GeneratedScenes(3, split='val').scene(1).masks)


def test_what_has_left_is_not_asked_for():
    # In clips of two frames whoever leaves is gone in the second.
    clips = GeneratedMovingScenes(length=60, num_frames=2)
    scenes = [clips.scene(index) for index in range(60)]
    gone = [{n for n, mask in enumerate(scene.masks2) if not mask.any()} for scene in scenes]
    assert sum(map(bool, gone)) >= 5
    for scene, lost in zip(scenes, gone, strict=True):
        assert set(clips.asked(scene)) == set(range(len(scene.masks))) - lost
