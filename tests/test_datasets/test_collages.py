"""Collages: what is said of them, what is to be seen, and what each split shows."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import (
    GeneratedCollages,
    collage_caption,
    vague_collage_caption,
)
from projects.llava_sam2_rl.datasets.collages import (
    MIN_VISIBLE,
    OBJECTS,
    SIDES,
    SIZES,
    Cutout,
    Placed,
    combinations,
    compose,
    cut_out,
    held_out,
)

SIZE = 128
NUM = 40


def combinations_of(scene):
    return [(x['size'], x['side'], x['object']) for x in scene.attributes]


@pytest.fixture(scope='module')
def sources() -> dict[tuple[str, bool], GeneratedCollages]:
    return {
        (split, paired): GeneratedCollages(NUM, image_size=SIZE, split=split, paired=paired)
        for split in ('train', 'val', 'test')
        for paired in (False, True)
    }


@pytest.fixture(scope='module', params=[False, True], ids=['single', 'paired'])
def drawn(request, sources):
    data = sources['train', request.param]
    return [data.scene(i) for i in range(NUM)]


def test_a_collage_is_a_function_of_seed_split_and_index(sources):
    data = sources['train', True]
    first, again = data.scene(4), GeneratedCollages(9, image_size=SIZE, paired=True).scene(4)
    for name in ('image', 'masks', 'image2', 'masks2'):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.attributes == again.attributes
    others = (
        data.scene(5),
        sources['test', True].scene(4),
        GeneratedCollages(9, image_size=SIZE, paired=True, seed=1).scene(4),
    )
    for other in others:
        assert not np.array_equal(first.image, other.image)


def test_captions_are_unique_and_the_kind_alone_never_tells(drawn):
    for collage in drawn:
        captions = collage.captions
        assert 3 <= len(captions) <= 4
        assert len(set(captions)) == len(captions)
        kinds = [name for *_, name in combinations_of(collage)]
        assert len(set(kinds)) < len(kinds)
        for caption, (size, side, name) in zip(captions, combinations_of(collage), strict=True):
            assert caption == f'the {size} {side} {name}'


def test_objects_of_a_kind_look_different_where_they_move(sources):
    data = sources['train', True]
    for i in range(NUM):
        looks = [(size, name) for size, _, name in combinations_of(data.scene(i))]
        assert len(set(looks)) == len(looks)


def test_what_is_said_is_what_is_to_be_seen(drawn):
    """Of objects that nothing hides: where the box lies, how much it covers."""
    seen = dict.fromkeys((*SIZES, *SIDES), 0)
    for collage in drawn:
        for mask, (size, side, _) in zip(collage.masks, combinations_of(collage), strict=True):
            share = mask.mean()
            if share > 0.88 * SIZES[size]:
                seen[size] += 1
                assert share < 1.15 * SIZES[size]
                columns = np.flatnonzero(mask.any(0))
                centre = (columns[0] + columns[-1] + 1) / 2 / SIZE
                third = SIDES.index(side)
                assert third / 3 - 0.02 < centre < (third + 1) / 3 + 0.02
                seen[side] += 1
    assert min(seen.values()) > 5


def test_masks_do_not_overlap_and_most_of_each_object_is_left(drawn):
    hidden = 0
    for collage in drawn:
        for masks in (collage.masks, collage.masks2):
            if masks is None:
                continue
            assert masks.sum(0).max() == 1
            for mask, (size, *_) in zip(masks, combinations_of(collage), strict=True):
                # Areas vary by a tenth, and edges by what pixels can show.
                assert mask.mean() > MIN_VISIBLE * 0.85 * SIZES[size]
                hidden += mask.mean() < 0.85 * SIZES[size]
    assert hidden > 0


def test_a_second_frame_shows_the_same_objects_elsewhere(sources):
    data = sources['train', True]
    moved = 0
    for i in range(NUM):
        collage = data.scene(i)
        for first, second in zip(collage.masks, collage.masks2, strict=True):
            (y, x), (y2, x2) = (np.argwhere(m).mean(0) / SIZE for m in (first, second))
            # What others hide moves the centre too.
            assert abs(x - x2) < 0.15 + 0.12
            assert abs(y - y2) < 0.15 + 0.12
            moved += abs(x - x2) + abs(y - y2) > 0.03
    assert moved > NUM


# -- pixels ----------------------------------------------------------------------------------------


def test_masks_fit_the_pixels_by_hand():
    """A white square of 4 x 4 pixels in its own size, and a black one before it."""
    square = {
        'cat': Cutout(np.full((4, 4, 3), 250, np.float32), np.ones((4, 4), np.float32)),
        'cup': Cutout(np.zeros((4, 4, 3), np.float32), np.ones((4, 4), np.float32)),
    }
    grey = np.full((20, 20, 3), 100, np.uint8)
    share = 16 / 400
    cat = Placed(('small', 'left', 'cat'), 0.25, 0.5, share, False, 1.0)
    cup = Placed(('small', 'left', 'cup'), 0.3, 0.6, share, False, 1.0)
    image, masks, visible = compose(grey, square, [cat, cup])
    # Columns 3 to 6 and 4 to 7, rows 8 to 11 and 10 to 13.
    expected = np.full((20, 20), 100)
    expected[8:12, 3:7], expected[10:14, 4:8] = 250, 0
    assert np.array_equal(image[..., 0], expected)
    assert np.array_equal(masks[0], expected == 250)
    assert np.array_equal(masks[1], expected == 0)
    assert visible == [10 / 16, 1.0]
    # Half of it outside of the picture: half is to be seen.
    edge = Placed(('small', 'left', 'cat'), 0.0, 0.5, share, False, 1.0)
    assert compose(grey, square, [edge])[2] == [0.5]


def test_light_and_flip_are_those_of_the_object():
    pixels = np.zeros((2, 4, 3), np.float32)
    pixels[:, 2:] = 200
    cutout = {'cat': Cutout(pixels, np.ones((2, 4), np.float32))}
    grey = np.full((10, 10, 3), 90, np.uint8)
    placed = Placed(('small', 'left', 'cat'), 0.5, 0.5, 8 / 100, True, 0.5)
    image, masks, _ = compose(grey, cutout, [placed])
    assert image[4, 3:7, 0].tolist() == [100, 100, 0, 0]
    assert (image[~masks[0]] == 90).all()


def test_an_outline_cuts_out_what_it_encloses():
    picture = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    found = cut_out(picture, [2, 1, 5, 1, 5, 4, 2, 4])
    assert found.alpha.tolist() == [[1.0] * 4] * 4
    assert np.array_equal(found.pixels, picture[1:5, 2:6].astype(np.float32))


def test_pixels_outside_of_all_objects_are_the_background(sources):
    """And inside they are not: with real cutouts, whose edges are soft for one pixel."""
    data = sources['train', False]
    grey = np.full((SIZE, SIZE, 3), 128, np.uint8)
    for name in OBJECTS:
        for size in SIZES:
            placed = Placed((size, 'middle', name), 0.5, 0.5, SIZES[size], False, 1.0)
            image, masks, visible = compose(grey, data.cutouts, [placed])
            near = cv2.dilate(masks[0].astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
            assert (image[~near] == 128).all()
            assert (image[masks[0]] != 128).any(1).mean() > 0.9
            assert masks[0].mean() == pytest.approx(SIZES[size], rel=0.08)
            assert visible == [1.0]


# -- splits ----------------------------------------------------------------------------------------


def test_what_is_held_out_is_in_no_other_split():
    val, test = held_out('val'), held_out('test')
    assert val[:3] == [
        ('small', 'left', 'cat'),
        ('large', 'middle', 'cup'),
        ('small', 'right', 'motorcycle'),
    ]
    assert not set(val) & set(test)
    for split, hidden in (('train', val + test), ('val', test), ('test', val)):
        assert not set(combinations(split)) & set(hidden)
    train = combinations('train')
    assert len(train) == 6 * 2 * 3 - 6 - 6
    # Training shows each object in both sizes and on all sides.
    for name in OBJECTS:
        assert {size for size, _, found in train if found == name} == set(SIZES)
        assert {side for _, side, found in train if found == name} == set(SIDES)


@pytest.mark.parametrize('paired', [False, True])
def test_validation_asks_for_what_training_never_shows(sources, paired):
    shown = {c for i in range(NUM) for c in combinations_of(sources['train', paired].scene(i))}
    for split in ('val', 'test'):
        assert not shown & set(held_out(split))
        asked = [sources[split, paired][i]['sample'] for i in range(NUM)]
        told = {tuple(x.attributes[key] for key in ('size', 'side', 'object')) for x in asked}
        assert told <= set(held_out(split))
        assert len(told) == 6


def test_a_sample_is_one_object_with_its_caption_and_another_ones(sources):
    data = sources['train', True]
    for i in range(6):
        sample = data[i]['sample']
        collage = data.scene(i)
        which = int(sample.sample_id.rsplit('-', 1)[1])
        assert sample.caption == collage_caption(combinations_of(collage)[which])
        assert sample.category == combinations_of(collage)[which][2]
        assert np.array_equal(sample.mask, collage.masks[which])
        assert np.array_equal(sample.mask2, collage.masks2[which])
        assert sample.distractor != sample.caption


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_objects': (1, 3)}, 'num_objects must lie between 2 and 6'),
        ({'split': 'all'}, "split must be one of train, val, test, got 'all'"),
        ({'image_size': 32}, 'image_size at least 64'),
        ({'length': 0}, 'length must be at least 1'),
        ({'max_shift': 0}, 'max_shift must lie'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GeneratedCollages(**{'length': 1, **options})


def test_missing_pictures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'lacks chelsea\.png, coffee\.png'):
        GeneratedCollages(1, image_dir=str(tmp_path))


def test_outlines_lie_inside_their_pictures_and_cross_nothing(sources):
    cutouts = sources['train', False].cutouts
    assert set(cutouts) == set(OBJECTS)
    for name, cutout in cutouts.items():
        count, *_ = cv2.connectedComponents(cutout.alpha.astype(np.uint8))
        assert count == 2, name  # the background and one piece
        assert min(cutout.alpha.shape) > 50
        assert 0.3 < cutout.alpha.mean() < 0.95


def test_vague_captions_keep_the_object_and_drop_the_rest_at_random():
    cat = {'size': 'large', 'side': 'left', 'object': 'cat'}
    rng = np.random.default_rng(0)
    seen = Counter(
        vague_collage_caption(cat, rng, {'size': 0.75, 'side': 0.25}) for _ in range(400)
    )
    assert set(seen) == {'the cat', 'the large cat', 'the left cat', 'the large left cat'}
    # 3/16 of 400 say both, 9/16 the size alone.
    assert seen['the large left cat'] == pytest.approx(75, abs=25)
    assert seen['the large cat'] == pytest.approx(225, abs=35)
    assert vague_collage_caption(cat, rng, 0.0) == 'the cat'
    assert vague_collage_caption(cat, rng, 1.0) == 'the large left cat'
