from collections import Counter

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import (
    GeneratedCollages,
    GeneratedMovingScenes,
    GeneratedScenes,
    Sa2VATransform,
    vague_caption,
)
from projects.llava_sam2_rl.datasets.scenes import COLOURS

SIZE = 128
NUM = 60


def scenes(**options):
    data = GeneratedScenes(NUM, image_size=SIZE, **options)
    return [data.scene(i) for i in range(NUM)]


@pytest.fixture(scope='module', params=[False, True], ids=['single', 'paired'])
def drawn(request):
    return scenes(paired=request.param)


def test_a_scene_is_a_function_of_seed_split_and_index():
    first, again = GeneratedScenes(9).scene(4), GeneratedScenes(9).scene(4)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)
    assert first.captions == again.captions
    for other in (GeneratedScenes(9).scene(5), GeneratedScenes(9, seed=1).scene(4)):
        assert not np.array_equal(first.image, other.image)


def test_no_combination_of_objects_is_in_two_splits(monkeypatch):
    # So few attributes that a combination would come up in two splits by chance.
    few = {
        'size': ('small', 'large'),
        'colour': ('red', 'blue'),
        'shape': ('circle', 'square'),
        'position': ('top left', 'center'),
    }
    monkeypatch.setattr('projects.llava_sam2_rl.datasets.scenes.VALUES', few)

    def combinations(split):
        data = GeneratedScenes(100, image_size=48, num_objects=(3, 3), split=split)
        return [frozenset(data.scene(i).captions) for i in range(100)]

    train, val, test = map(combinations, ('train', 'val', 'test'))
    assert len(set(train)) < 90  # they do come up again
    assert not set(train) & set(val)
    assert not set(train) & set(test)
    assert not set(val) & set(test)


def test_captions_are_unique_and_follow_the_grammar(drawn):
    for scene in drawn:
        assert 3 <= len(scene.captions) <= 5
        assert len(set(scene.captions)) == len(scene.captions)
        for caption, a in zip(scene.captions, scene.attributes):
            assert caption == (f'a {a["size"]} {a["colour"]} {a["shape"]} in the {a["position"]}')


def test_no_single_attribute_tells_the_objects_apart(drawn):
    for scene in drawn:
        for key in ('size', 'colour', 'shape', 'position'):
            values = [a[key] for a in scene.attributes]
            assert max(Counter(values).values()) >= 2, (key, scene.captions)


def test_every_attribute_has_to_be_heard(drawn):
    """In one scene of twenty at least two objects differ in this attribute alone."""
    paired = drawn[0].image2 is not None
    decisive = Counter()
    for scene in drawn:
        for i, a in enumerate(scene.attributes):
            for b in scene.attributes[:i]:
                differs = [key for key in a if a[key] != b[key]]
                if len(differs) == 1:
                    decisive[differs[0]] += 1
    for key in ('size', 'shape', 'colour' if paired else 'position'):
        assert decisive[key] >= NUM / 20, decisive


def test_masks_agree_with_the_position_words(drawn):
    for scene in drawn:
        for mask, a in zip(scene.masks, scene.attributes):
            rows, columns = np.nonzero(mask)
            y, x = (rows.mean() + 0.5) / SIZE, (columns.mean() + 0.5) / SIZE
            # Well inside its third: at least 2 % of the side away from the next cell.
            words = a['position'].split()
            vertical = 'top' if 'top' in words else 'bottom' if 'bottom' in words else 'center'
            across = 'left' if 'left' in words else 'right' if 'right' in words else 'center'
            for value, word, low, high in (
                (y, vertical, 'top', 'bottom'),
                (x, across, 'left', 'right'),
            ):
                if word == low:
                    assert value < 1 / 3 - 0.02
                elif word == high:
                    assert value > 2 / 3 + 0.02
                else:
                    assert 1 / 3 + 0.02 < value < 2 / 3 - 0.02


def test_masks_are_visible_disjoint_and_show_the_colour(drawn):
    for scene in drawn:
        frames = [(scene.image, scene.masks)]
        if scene.image2 is not None:
            frames.append((scene.image2, scene.masks2))
        for image, masks in frames:
            assert image.shape == (SIZE, SIZE, 3)
            assert image.dtype == np.uint8
            assert masks.dtype == bool
            assert masks.sum(0).max() == 1
            assert masks.mean((1, 2)).min() >= 0.015
            for mask, a in zip(masks, scene.attributes):
                mean = image[mask].mean(0)
                nearest = min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())
                assert nearest == a['colour']


def test_sizes_are_told_by_area(drawn):
    areas = {'small': [], 'large': []}
    for scene in drawn:
        for mask, a in zip(scene.masks, scene.attributes):
            areas[a['size']].append(mask.mean())
    assert max(areas['small']) < 0.04 < 0.05 < min(areas['large'])


def test_pairs_move_every_object_a_little_and_look_distinct():
    moved = []
    for scene in scenes(paired=True, max_shift=0.1):
        looks = [(a['size'], a['colour'], a['shape']) for a in scene.attributes]
        assert len(set(looks)) == len(looks)
        for mask, mask2 in zip(scene.masks, scene.masks2):
            centre = np.argwhere(mask).mean(0) / SIZE
            shift = np.abs(np.argwhere(mask2).mean(0) / SIZE - centre)
            # Up to a tenth of an object may be hidden, which moves its visible centre.
            assert shift.max() <= 0.1 + 0.02
            moved.append(shift.max())
    assert np.mean(moved) > 0.03


def test_reading_gives_one_object_and_indices_reach_them_all():
    data = GeneratedScenes(2, paired=True, split='val')
    scene = data.scene(1)
    seen = set()
    for epoch in range(30):
        sample = data[epoch * len(data) + 1]['sample']
        which = int(sample.sample_id.rsplit('-', 1)[1])
        seen.add(which)
        assert sample.name == f'scenes/val-1-{which}'
        assert sample.caption == scene.captions[which]
        assert sample.distractor in {*scene.captions} - {sample.caption}
        assert np.array_equal(sample.mask, scene.masks[which])
        assert np.array_equal(sample.mask2, scene.masks2[which])
    assert seen == set(range(len(scene.captions)))
    transform = Sa2VATransform(image_size=56, grounding_size=64)
    item = GeneratedScenes(2, paired=True, transforms=transform)[0]
    assert item['masks2'].shape == (1, 128, 128)
    assert item['skipped'] == []


@pytest.mark.parametrize('source', [GeneratedScenes, GeneratedCollages, GeneratedMovingScenes])
def test_an_item_may_ask_for_several_objects_each_by_its_caption(source):
    data = source(3, num_regions=2, split='val')
    scene, seen = data.scene(1), set()
    for epoch in range(20):
        sample = data[epoch * len(data) + 1]['sample']
        chosen = [int(n) for n in sample.sample_id.split('-')[2:]]
        assert len(set(chosen)) == 2
        seen.update(chosen)
        assert sample.region_captions == tuple(scene.captions[n] for n in chosen)
        assert np.array_equal(sample.mask, scene.masks[chosen])
        for (_, mask), masks in zip(sample.frames[1:], [scene.masks2, *scene.more_masks]):
            assert np.array_equal(mask, masks[chosen])
        assert sample.caption is sample.distractor is sample.attributes is None
    assert seen == set(data.asked(scene))
    # More than there are: all of them.
    every = source(3, num_regions=9, split='val')[1]['sample']
    assert every.num_regions == len(data.asked(scene))
    # Without captions they are still several.
    bare = source(3, num_regions=2, split='val', withhold_captions=True)[1]['sample']
    assert bare.region_captions == (None, None)


def test_vague_captions_keep_the_shape_and_drop_the_rest_at_random():
    a = {'size': 'small', 'colour': 'orange', 'shape': 'star', 'position': 'top left'}
    rng = np.random.default_rng(0)
    seen = Counter(vague_caption(a, rng, 0.5) for _ in range(400))
    assert set(seen) == {
        'a star',
        'a small star',
        'an orange star',
        'a small orange star',
        'a star in the top left',
        'a small star in the top left',
        'an orange star in the top left',
        'a small orange star in the top left',
    }
    assert min(seen.values()) > 20  # 50 expected
    assert vague_caption(a, rng, 0.0) == 'a star'
    keep = {'position': 1.0, 'size': 1.0, 'colour': 0.0}
    assert vague_caption(a, rng, keep) == 'a small star in the top left'
    assert vague_caption(a, rng, 1.0) == 'a small orange star in the top left'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_objects': (2, 4)}, 'num_objects'),
        ({'split': 'dev'}, 'dev'),
        ({'image_size': 16}, '16'),
        ({'max_shift': 0}, 'max_shift'),
        ({'num_regions': 0}, 'num_regions'),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GeneratedScenes(4, **options)
