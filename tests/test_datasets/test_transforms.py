import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from projects.llava_sam2_rl.datasets import BadRecord, Photographs, Sa2VATransform
from projects.llava_sam2_rl.datasets.transforms import tile_grid
from projects.llava_sam2_rl.structures import RegionSample
from projects.llava_sam2_rl.utils import masks as masks_module
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid


def sample(height=60, width=90, regions=None, **kwargs):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    shape = (height, width) if regions is None else (regions, height, width)
    mask = np.zeros(shape, bool)
    mask[..., 10:40, 20:70] = True
    return RegionSample(image, mask, source='set', sample_id='1', **kwargs)


def test_grid_is_the_official_nearest_one():
    rng = np.random.default_rng(1)
    masks = np.stack([rng.random((37, 61)) < 0.5, np.zeros((37, 61), bool)])
    masks[1, 5:30, 8:50] = True
    grid = prompt_mask_grid(masks, 16)
    # Source pixel of cell i: floor(i * side / cells).
    rows, columns = np.arange(16) * 37 // 16, np.arange(16) * 61 // 16
    assert np.array_equal(grid.numpy(), masks[:, rows][:, :, columns])
    # And the line of the official code itself.
    official = F.interpolate(torch.from_numpy(masks).float()[None], (16, 16), mode='nearest')[0]
    assert torch.equal(grid, official.bool())


@pytest.mark.parametrize('on_a_gpu', [False, True])
def test_a_region_that_nearest_misses_takes_every_cell_it_touches(monkeypatch, on_a_gpu):
    if on_a_gpu:  # where all regions are looked at again
        monkeypatch.setattr(masks_module, '_looked_at_again', lambda x: torch.arange(len(x)))
    masks = np.zeros((3, 64, 64), bool)
    masks[0, 9, 9] = masks[0, 63, 1] = True  # between the sampled pixels 8 and 12, 0 and 4
    masks[1, 8, 8] = masks[1, 63, 1] = True  # one sampled, one not: nearest keeps the first alone
    grid = prompt_mask_grid(masks, (16, 16))
    assert grid[0].nonzero().tolist() == [[2, 2], [15, 0]]
    assert grid[1].nonzero().tolist() == [[2, 2]]
    assert not grid[2].any()


def test_grid_refuses_other_shapes_and_types():
    with pytest.raises(ValueError, match='bool'):
        prompt_mask_grid(np.zeros((1, 4, 4), np.uint8), 2)
    with pytest.raises(ValueError, match='R, H, W'):
        prompt_mask_grid(np.zeros((4, 4), bool), 2)


def test_item_of_the_official_sizes():
    item = Sa2VATransform()(sample(regions=2, caption='two things', category='thing'))
    assert item['pixel_values'].shape == (1, 3, 448, 448)
    assert item['pixel_values'].dtype == torch.float32
    assert item['g_pixel_values'].shape == (3, 1024, 1024)
    assert item['g_pixel_values'].dtype == torch.uint8
    assert item['prompt_masks'].shape == (2, 16, 16)
    assert item['prompt_masks'].dtype == torch.bool
    assert item['masks'].shape == (2, 60, 90)
    assert item['masks'].dtype == torch.bool
    assert item['vp_overall_mask'].tolist() == [True]
    assert item['masks'].sum().item() == 2 * 30 * 50
    assert all(item[f'{key}2'] is None for key in ('pixel_values', 'masks', 'vp_overall_mask'))
    meta = item['meta']
    assert (meta.name, meta.caption, meta.category) == ('set/1', 'two things', 'thing')
    assert (meta.height, meta.width) == (60, 90)


def test_pixels_are_bicubic_and_imagenet_normalised():
    record = sample()
    transform = Sa2VATransform(image_size=56, grounding_size=128)
    item = transform(record)
    picture = Image.fromarray(record.image)
    small = np.asarray(picture.resize((56, 56), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    expected = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    got = item['pixel_values'][0].permute(1, 2, 0).numpy()
    # One level of 255 at most, and seldom.
    np.testing.assert_allclose(got, expected, atol=1.01 / 255 / 0.224)
    assert (np.abs(got - expected) > 1e-5).mean() < 0.02
    assert transform.tokens_per_tile == 4
    assert item['prompt_masks'].shape == (1, 2, 2)


def photograph(name='coffee.png', size=(1024, 683)):
    return Image.open(Photographs().image_dir / name).convert('RGB').resize(size)


@pytest.mark.parametrize(
    'size', [(1024, 683), (683, 1024), (1024, 1024), (640, 480), (300, 200), (2048, 1500)]
)
def test_photographs_come_out_as_pil_resizes_them(size):
    picture = photograph(size=size)
    item = Sa2VATransform()(RegionSample(np.array(picture), np.ones(size[::-1], bool)))
    small = item['pixel_values'][0].permute(1, 2, 0).numpy()
    small = (small * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]) * 255
    difference = np.abs(small - np.asarray(picture.resize((448, 448)), float))
    assert difference.mean() < 0.2
    assert (difference > 1.01).mean() < 1e-4
    large = item['g_pixel_values'].permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(large - np.asarray(picture.resize((1024, 1024)), int))
    assert difference.mean() < 0.6


@pytest.fixture(scope='module')
def internvl():
    """xtuner's copy of InternVL's tiling, where it can be imported."""
    return pytest.importorskip('xtuner.dataset.internvl_dataset', exc_type=ImportError)


@pytest.mark.parametrize(
    ('size', 'side', 'most', 'expected'),
    [
        # One nearest ratio: columns by rows.
        ((600, 200), 448, 12, (3, 1)),
        ((200, 600), 448, 12, (1, 3)),
        ((640, 480), 448, 12, (4, 3)),
        ((640, 480), 448, 6, (3, 2)),
        ((640, 480), 448, 1, (1, 1)),
        # 1x1, 2x2 and 3x3 are equally near. Half of what their tiles cover of 448 px: 100 352,
        # 401 408 and 903 168 pixels.
        ((100, 100), 448, 12, (1, 1)),
        ((448, 448), 448, 12, (1, 1)),
        ((800, 800), 448, 12, (2, 2)),
        ((960, 960), 448, 12, (3, 3)),
        # A ratio of 1.25 lies between 1 (one tile, four) and 1.5 (six).
        ((500, 400), 448, 6, (1, 1)),
        ((500, 400), 300, 6, (2, 2)),  # half of four tiles: 180 000 of 200 000 pixels; six: 270 000
        ((500, 400), 100, 6, (3, 2)),
    ],
)
def test_the_grid_of_tiles(size, side, most, expected):
    assert tile_grid(*size, side, most) == expected


def test_the_grid_of_tiles_is_internvls(internvl):
    rng = np.random.default_rng(5)
    sizes = rng.integers(20, 3000, (400, 2)).tolist()
    sizes += [[n * 7, m * 7] for n in range(20, 200, 9) for m in range(20, 200, 11)]
    sizes += [[n * 90, 100] for n in range(1, 14)]
    seen = set()
    for most in (2, 6, 12):
        grids = {(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most}
        ordered = sorted(grids, key=lambda grid: grid[0] * grid[1])
        for width, height in sizes:
            expected = internvl.find_closest_aspect_ratio(
                width / height, ordered, width, height, 448
            )
            assert tile_grid(width, height, 448, most) == expected, (width, height)
            seen.add(expected)
    assert seen == grids  # every one of twelve tiles


@pytest.mark.parametrize('size', [(600, 200), (500, 500), (300, 900), (700, 500)])
@pytest.mark.parametrize('most', [2, 6, 12])
def test_tiles_are_those_of_internvl(internvl, size, most):
    picture = photograph(size=size)
    transform = Sa2VATransform(image_size=56, grounding_size=64, max_dynamic_patch=most)
    got = transform._tiles(np.array(picture)).permute(0, 2, 3, 1).numpy().astype(int)
    tiles = internvl.dynamic_preprocess(picture, max_num=most, image_size=56, use_thumbnail=True)
    expected = np.stack([np.asarray(tile, int) for tile in tiles])
    assert got.shape == expected.shape
    difference = np.abs(got - expected)
    assert difference.mean() < 0.2
    assert (difference > 1).mean() < 1e-3


@pytest.mark.parametrize('cells', [6, 12, 16, 7])
def test_grid_rounds_as_torch_does(cells):
    rng = np.random.default_rng(cells)
    for side in rng.integers(cells, 1500, 40).tolist():
        masks = torch.from_numpy(rng.random((1, side, 50)) < 0.5)
        official = F.interpolate(masks[None].float(), (cells, cells), mode='nearest')[0].bool()
        assert torch.equal(prompt_mask_grid(masks, cells), official)


def test_tiles_come_in_reading_order_with_the_whole_image_last():
    image = np.zeros((50, 100, 3), np.uint8)
    image[:, 50:] = 255
    record = RegionSample(image, np.ones((50, 100), bool))
    item = Sa2VATransform(image_size=28, grounding_size=32, max_dynamic_patch=2)(record)
    assert item['vp_overall_mask'].tolist() == [False, False, True]
    left, right, whole = item['pixel_values'][:, 0].flatten(1).mean(1).tolist()
    black, white = -0.485 / 0.229, (1 - 0.485) / 0.229
    # Bicubic overshoots by a little at the edge in the middle.
    assert left == pytest.approx(black, abs=0.1)
    assert right == pytest.approx(white, abs=0.1)
    assert whole == pytest.approx((black + white) / 2, abs=0.1)


def test_the_second_frame_is_treated_alike():
    rng = np.random.default_rng(2)
    image2 = rng.integers(0, 256, (80, 40, 3), dtype=np.uint8)
    mask2 = np.zeros((80, 40), bool)
    mask2[70:, 30:] = True
    record = sample(image2=image2, mask2=mask2)
    transform = Sa2VATransform(image_size=56, grounding_size=64)
    item, alone = transform(record), transform(RegionSample(image2, mask2))
    for key in ('pixel_values', 'vp_overall_mask', 'g_pixel_values', 'prompt_masks', 'masks'):
        assert torch.equal(item[f'{key}2'], alone[key])
    assert item['masks2'].shape == (1, 80, 40)


def clip(shown, sizes=((60, 90),) * 4):
    """Four frames of their own colour; those of ``shown`` have the object, each at its place."""
    images = [np.full((*size, 3), 40 * t, np.uint8) for t, size in enumerate(sizes)]
    masks = [np.zeros(size, bool) for size in sizes]
    for t in shown:
        masks[t][5 * t : 5 * t + 9, :9] = True
    return RegionSample.of_clip(images, masks, source='set', sample_id='1')


def test_of_a_clip_the_last_frame_that_shows_the_object_is_the_second_frame():
    record = clip([0, 1, 2])
    transform = Sa2VATransform(image_size=56, grounding_size=64)
    item = transform(record)
    alone = [transform(RegionSample(*frame)) for frame in record.frames[:3]]
    assert item['frame2'] == 2
    for key in ('pixel_values', 'vp_overall_mask', 'g_pixel_values', 'prompt_masks', 'masks'):
        assert torch.equal(item[key], alone[0][key])
        assert torch.equal(item[f'{key}2'], alone[2][key])
    assert [frame['frame'] for frame in item['clip']] == [1, 3]
    for key in ('g_pixel_values', 'masks'):
        assert torch.equal(item['clip'][0][key], alone[1][key])
    assert not item['clip'][1]['masks'].any()
    assert item['clip'][1]['g_pixel_values'].unique().tolist() == [120]
    # The language model sees all of them, in order; the masks have no part in it.
    everywhere = np.ones((60, 90), bool)
    shown = [transform(RegionSample(image, everywhere)) for image, _ in record.frames]
    tiles = [one['pixel_values'].reshape(3, 56, 56) for one in shown]
    assert torch.equal(item['clip_pixel_values'], torch.stack(tiles))


def test_a_clip_of_one_frame_is_an_image():
    record = sample()
    transform = Sa2VATransform(image_size=56, grounding_size=64)
    item = transform(RegionSample.of_clip([record.image], [record.mask], source='set'))
    for key in ('pixel_values', 'g_pixel_values', 'prompt_masks', 'masks'):
        assert torch.equal(item[key], transform(record)[key])
        assert item[f'{key}2'] is None
    assert (item['frame2'], item['clip']) == (None, [])


@pytest.mark.parametrize(
    ('record', 'reason'),
    [
        (clip([1, 2]), 'late_mask'),
        (clip([]), 'empty_mask'),
        (clip([0]), 'empty_mask'),
        (clip([0, 1, 2, 3], ((60, 90), (60, 90), (60, 80), (60, 90))), 'frame_size'),
    ],
)
def test_a_clip_that_cannot_be_used_says_why(record, reason):
    with pytest.raises(BadRecord, match='set/1') as error:
        Sa2VATransform(image_size=56, grounding_size=64)(record)
    assert error.value.reason == reason


@pytest.mark.parametrize('which', ['mask', 'mask2', 'one of two'])
def test_an_empty_mask_is_a_bad_record(which):
    record = sample(regions=2 if which == 'one of two' else None)
    empty = np.zeros((60, 90), bool)
    if which == 'mask':
        record = RegionSample(record.image, empty, source='set', sample_id='1')
    elif which == 'mask2':
        record = RegionSample(
            record.image, record.mask, None, record.image, empty, source='set', sample_id='1'
        )
    else:
        record.mask[1] = False
    with pytest.raises(BadRecord, match='set/1') as error:
        Sa2VATransform(image_size=56, grounding_size=64)(record)
    assert error.value.reason == 'empty_mask'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'image_size': 450}, '450'),
        ({'image_size': 42}, r'1\.5'),
        ({'max_dynamic_patch': 4, 'use_thumbnail': False}, 'thumbnail'),
    ],
)
def test_sizes_that_give_no_grid_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sa2VATransform(**options)
