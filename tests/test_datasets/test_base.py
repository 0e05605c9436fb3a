from collections import Counter

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import (
    BadRecord,
    GeneratedScenes,
    MixedRegionDataset,
    RegionDataset,
    Sa2VATransform,
)
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample


class Numbers(RegionDataset):
    """Record i is an image filled with i; records in ``bad`` cannot be read."""

    def __init__(self, length=10, bad=(), source='numbers', captions=True, **kwargs):
        super().__init__(source=source, **kwargs)
        self.length, self.bad, self.captions = length, bad, captions

    @property
    def num_records(self):
        return self.length

    def sample_id(self, index):
        return f'n{index}'

    def read(self, index, rng):
        if index in self.bad:
            raise BadRecord('missing_image', f'{self.source}/n{index}', 'file')
        caption = f'{index} {rng.integers(1_000_000)}' if self.captions else ' '
        return RegionSample(
            np.full((4, 4, 3), index, np.uint8),
            np.ones((4, 4), bool),
            caption,
            source=self.source,
            sample_id=f'n{index}',
        )


def number(item):
    return int(item['sample'].image[0, 0, 0])


def test_the_index_decides_all_that_is_random():
    data, same, other = Numbers(bad=(3,)), Numbers(bad=(3,)), Numbers(bad=(3,), seed=1)
    backwards = {index: same[index]['sample'].caption for index in reversed(range(30))}
    captions = [data[index]['sample'].caption for index in range(30)]
    assert captions == [backwards[index] for index in range(30)]
    assert captions != [other[index]['sample'].caption for index in range(30)]
    # Another epoch draws anew for the same record.
    assert number(data[4]) == number(data[14]) == 4
    assert captions[4] != captions[14]


def test_the_generator_is_numpys_for_seed_and_index():
    drawn = np.random.default_rng([5, 12]).integers(1_000_000)
    assert Numbers(seed=5)[12]['sample'].caption == f'2 {drawn}'


def test_a_bad_record_is_replaced_by_another_of_its_source_and_reported():
    data = Numbers(length=10, bad=(0, 1, 2, 3, 4))
    replacements = Counter()
    for epoch in range(40):
        item = data[epoch * 10]
        assert number(item) >= 5
        assert item['skipped'][0] == ('numbers', 'n0', 'missing_image')
        assert all(int(name[1:]) < 5 for _, name, _ in item['skipped'])
        replacements[number(item)] += 1
        assert data[epoch * 10 + 7]['skipped'] == []
    assert set(replacements) == {5, 6, 7, 8, 9}


def test_a_source_without_a_usable_record_stops_with_the_reasons():
    with pytest.raises(RuntimeError, match=r'numbers: 6 records in a row.*6 x missing_image'):
        Numbers(length=4, bad=range(4), max_attempts=6)[0]


def test_only_bad_records_are_replaced():
    class Broken(Numbers):
        def read(self, index, rng):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Broken()[0]


def test_empty_captions_are_bad_where_one_is_needed():
    assert Numbers(captions=False)[0]['sample'].caption == ' '
    with pytest.raises(RuntimeError, match='empty_caption'):
        Numbers(captions=False, needs_caption=True)[0]


def test_captions_can_be_withheld():
    assert Numbers()[0]['sample'].caption is not None
    assert Numbers(withhold_captions=True)[0]['sample'].caption is None
    with pytest.raises(ValueError, match='exclude each other'):
        Numbers(withhold_captions=True, needs_caption=True)


def test_empty_masks_are_found_by_the_transform_and_replaced():
    class Holes(Numbers):
        def read(self, index, rng):
            sample = super().read(index, rng)
            sample.mask[:] = index % 2
            return sample

    transform = {'type': 'Sa2VATransform', 'image_size': 28, 'grounding_size': 32}
    for transforms in (transform, [transform], Sa2VATransform(image_size=28, grounding_size=32)):
        item = Holes(transforms=transforms)[2]
        assert item['skipped'][0] == ('numbers', 'n2', 'empty_mask')
        assert int(item['meta'].sample_id[1:]) % 2 == 1
    assert Holes()[2]['skipped'][0] == ('numbers', 'n2', 'empty_mask')


def test_repeats_and_caps():
    data = Numbers(length=10, repeats=3)
    assert len(data) == 30
    assert [number(item) for item in data] == list(range(10)) * 3
    capped = Numbers(length=10, max_samples=4, repeats=2)
    chosen = [number(item) for item in capped]
    assert len(capped) == 8
    assert chosen[:4] == chosen[4:] == sorted(set(chosen[:4]))
    again = [number(item) for item in Numbers(length=10, max_samples=4, repeats=2)]
    assert chosen == again
    drawn = {tuple(number(i) for i in Numbers(max_samples=4, seed=s)) for s in range(8)}
    assert len(drawn) > 4  # the subset depends on the seed, it is not simply the first four
    assert len(Numbers(length=3, max_samples=50)) == 3
    # Replacements keep to the subset.
    capped.bad = (chosen[0],)
    assert {number(capped[8 * epoch]) for epoch in range(30)} == set(chosen[1:4])


class Pictures(Numbers):
    """Three records a picture."""

    def image_key(self, index):
        return f'p{index // 3}'


def test_a_share_of_the_pictures_is_held_out():
    train, val = Pictures(60, part='train'), Pictures(60, part='val')
    assert (len(train), len(val)) == (54, 6)  # 18 and 2 of 20 pictures
    seen = [[number(item) for item in data] for data in (train, val)]
    assert sorted(seen[0] + seen[1]) == list(range(60))
    assert {i // 3 for i in seen[0]}.isdisjoint({i // 3 for i in seen[1]})
    # By the pictures' names alone: neither the seed nor the order decides.
    assert [number(item) for item in Pictures(60, part='val', seed=5)] == seen[1]
    half = {number(item) for item in Pictures(60, part='val', val_share=0.5)}
    assert len(half) == 30
    assert half > set(seen[1])
    few = Pictures(60, part='train', max_samples=10, repeats=2)
    assert len(few) == 20
    assert {number(item) for item in few} < set(seen[0])
    # At least one picture on either side.
    sizes = [
        len(Pictures(9, part=part, val_share=s)) for part in ('train', 'val') for s in (0.01, 0.99)
    ]
    assert sizes == [6, 3, 3, 6]
    with pytest.raises(ValueError, match=r"numbers: 1 pictures cannot.*leave part='val' out"):
        len(Pictures(3, part='val'))


def test_mixed_sources_keep_their_indices():
    a, b = Numbers(length=3, source='a', repeats=2), Numbers(length=4, source='b')
    mixed = MixedRegionDataset([a, b])
    assert len(mixed) == 10
    for epoch in (0, 1, 5):
        for i in range(10):
            alone = a[epoch * 6 + i] if i < 6 else b[epoch * 4 + i - 6]
            assert mixed[epoch * 10 + i]['sample'].caption == alone['sample'].caption
            assert mixed[epoch * 10 + i]['sample'].source == ('a' if i < 6 else 'b')
    assert len(list(mixed)) == 10


def test_mixed_sources_are_built_from_configs():
    config = {
        'type': 'MixedRegionDataset',
        'datasets': [{'type': 'GeneratedScenes', 'length': 2}, {'type': 'Photographs'}],
    }
    mixed = DATASETS.build(config)
    assert isinstance(mixed.datasets[0], GeneratedScenes)
    assert mixed[1]['sample'].source == 'scenes'
    assert mixed[2]['sample'].source == 'photographs'


def test_options_out_of_range_are_refused():
    for options in (
        {'repeats': 0},
        {'max_samples': 0},
        {'max_attempts': 0},
        {'max_caption_tokens': 0},
        {'part': 'test'},
        {'val_share': 1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            Numbers(**options)
    with pytest.raises(IndexError, match='-1'):
        Numbers()[-1]
    with pytest.raises(ValueError, match='empty'):
        MixedRegionDataset([Numbers(), Numbers(length=0, source='empty')])
    with pytest.raises(ValueError, match='at least one'):
        MixedRegionDataset([])
    with pytest.raises(TypeError, match='transforms'):
        Numbers(transforms=3)


def test_the_message_of_a_bad_record_names_it():
    error = BadRecord('bad_rle', 'set/4', 'cut short')
    assert str(error) == 'set/4: bad_rle: cut short'
    assert (error.reason, error.name, error.detail) == ('bad_rle', 'set/4', 'cut short')
