import numpy as np
import pytest
import torch

from projects.llava_sam2_rl.datasets import Sa2VATransform, sa2va_collate
from projects.llava_sam2_rl.registry import FUNCTIONS
from projects.llava_sam2_rl.structures import RegionSample

FRAME = ('pixel_values', 'g_pixel_values', 'prompt_masks', 'masks')


def item(height, width, regions=1, paired=False, caption=None, name='1', patches=1):
    image = np.full((height, width, 3), regions, np.uint8)
    mask = np.ones((regions, height, width), bool)
    second = {'image2': image[:-2], 'mask2': mask[:, :-2]} if paired else {}
    transform = Sa2VATransform(image_size=28, grounding_size=32, max_dynamic_patch=patches)
    return transform(RegionSample(image, mask, caption, source='set', sample_id=name, **second))


def test_images_of_different_size_and_several_regions():
    items = [item(20, 30, 2, caption='two'), item(40, 24, 1, name='2'), item(28, 56, 3, patches=2)]
    items[1]['skipped'] = [('set', '7', 'empty_mask')]
    items[2]['skipped'] = [('set', '8', 'bad_rle'), ('set', '9', 'empty_mask')]
    batch = sa2va_collate(items)
    data = batch['data']
    assert [tuple(m.shape) for m in data['masks']] == [(2, 20, 30), (1, 40, 24), (3, 28, 56)]
    assert [tuple(m.shape) for m in data['prompt_masks']] == [(2, 1, 1), (1, 1, 1), (3, 1, 1)]
    assert [len(p) for p in data['pixel_values']] == [1, 1, 3]
    assert data['vp_overall_mask'].tolist() == [True, True, False, False, True]
    assert [tuple(g.shape) for g in data['g_pixel_values']] == [(3, 32, 32)] * 3
    assert data['captions'] == ['two', None, None]
    assert data['pair'] is None
    assert data['skipped'] == [
        ('set', '7', 'empty_mask'),
        ('set', '8', 'bad_rle'),
        ('set', '9', 'empty_mask'),
    ]
    assert [meta.sample_id for meta in batch['data_samples']] == ['1', '2', '1']


def test_pairs_name_the_samples_they_belong_to():
    items = [item(20, 30), item(40, 24, 2, paired=True), item(10, 10), item(50, 50, paired=True)]
    pair = sa2va_collate(items)['data']['pair']
    assert pair['index'].tolist() == [1, 3]
    assert pair['index'].dtype == torch.int64
    assert [tuple(m.shape) for m in pair['masks']] == [(2, 38, 24), (1, 48, 50)]
    assert pair['vp_overall_mask'].tolist() == [True, True]
    for key in FRAME:
        assert len(pair[key]) == 2
        assert torch.equal(pair[key][1], items[3][f'{key}2'])


def test_frames_of_clips_name_their_samples_and_places():
    transform = Sa2VATransform(image_size=28, grounding_size=32)

    def clip(count):
        images = [np.full((20, 30, 3), 10 * t, np.uint8) for t in range(count)]
        return transform(RegionSample.of_clip(images, [np.ones((20, 30), bool)] * count))

    data = sa2va_collate([item(20, 30), clip(4), item(40, 24, paired=True), clip(3)])['data']
    assert (data['pair']['index'].tolist(), data['pair']['frame'].tolist()) == (
        [1, 2, 3],
        [3, 1, 2],
    )
    others = data['clip']
    assert (others['index'].tolist(), others['frame'].tolist()) == ([1, 1, 3], [1, 2, 1])
    assert [int(x.max()) for x in others['g_pixel_values']] == [10, 20, 10]
    assert [tuple(x.shape) for x in others['masks']] == [(1, 20, 30)] * 3
    assert sa2va_collate([item(20, 30), item(9, 9, paired=True)])['data']['clip'] is None


def test_it_is_found_by_name_and_refuses_nothing():
    assert FUNCTIONS.get('sa2va_collate') is sa2va_collate
    with pytest.raises(ValueError, match='at least one'):
        sa2va_collate([])
