"""What a collated batch becomes: images encoded once, regions, where the return trip happens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from projects.llava_sam2_rl.datasets import sa2va_collate
from projects.llava_sam2_rl.models.batch import encode_batch
from projects.llava_sam2_rl.structures import RegionSample
from test_models.batches import encode, only


def test_the_return_trip_happens_on_the_second_frame(tiny_model, batch):
    encoded = encode_batch(tiny_model.policy, batch['data'])
    assert encoded.image == [0, 1, 2, 3]
    assert encoded.target_image == [0, 1, 4, 5]
    pair = batch['data']['pair']
    for i, expected in enumerate(
        [batch['data']['masks'][0], batch['data']['masks'][1], *pair['masks']]
    ):
        assert torch.equal(encoded.target_masks[i], expected[0])
    assert not torch.equal(encoded.target_masks[2], encoded.gt_masks[2])


def test_masks_for_one_caption_are_joined(tiny_model, tiny_transform):
    masks = np.zeros((2, 100, 80), dtype=bool)
    masks[0, :20, :20] = masks[1, 60:, 50:] = True
    image = np.full((100, 80, 3), 90, np.uint8)
    item = tiny_transform(RegionSample(image=image, mask=masks, caption='two corners'))
    encoded = encode_batch(tiny_model.policy, sa2va_collate([item])['data'])
    assert torch.equal(encoded.target_masks[0], torch.from_numpy(masks.any(0)))
    assert torch.equal(encoded.gt_masks[0], torch.from_numpy(masks.any(0)))
    assert [len(grid) for grid in encoded.prompt_masks] == [2]


def test_features_of_a_batch_equal_one_by_one(tiny_model, batch):
    together = encode(tiny_model, batch).features
    for i in range(4):
        alone = encode(tiny_model, only(batch, i)).features
        assert alone.num_tiles[0] == together.num_tiles[i]
        start = sum(together.num_tiles[:i])
        torch.testing.assert_close(
            alone.vit[:1], together.vit[start : start + 1], atol=1e-5, rtol=1e-4
        )


def test_names_are_the_samples_or_their_numbers(tiny_model, batch):
    assert encode_batch(tiny_model.policy, batch['data']).names == ['0', '1', '2', '3']
    names = [meta.name for meta in batch['data_samples']]
    assert encode(tiny_model, batch).names == names


def test_regions_conversations_and_captions_are_told_apart(tiny_model, batch, mixed):
    encoded = encode(tiny_model, mixed)
    assert (encoded.regions, encoded.chats) == ([0, 2], [1])
    assert encoded.captioned == [0, 2]
    assert encode(tiny_model, batch).captioned == [0, 2, 3]


def test_a_subset_keeps_the_features_and_where_its_samples_look(tiny_model, batch):
    encoded = encode(tiny_model, batch)
    part = encoded.subset([1, 3])
    assert len(part) == 2
    assert part.features is encoded.features
    assert part.image == [1, 3]
    assert part.target_image == [1, 5]
    assert part.captions == [None, encoded.captions[3]]
    assert part.names == [encoded.names[1], encoded.names[3]]
    assert part.prompt_masks[1] is encoded.prompt_masks[3]
    assert encoded.subset(range(4)) is encoded


@pytest.mark.parametrize('captions', [[None] * 4, [''] * 4])
def test_an_empty_caption_is_none(tiny_model, batch, captions):
    encoded = encode_batch(tiny_model.policy, {**batch['data'], 'captions': captions})
    assert encoded.captioned == []
    assert encoded.regions == [0, 1, 2, 3]


def test_a_caption_that_is_asked_for_has_to_be_there(tiny_model, batch):
    encoded = encode(tiny_model, batch)
    assert encoded.reference(0) == batch['data']['captions'][0]
    with pytest.raises(ValueError, match=f"'{encoded.names[1]}' has no reference caption"):
        encoded.reference(1)


@pytest.fixture(scope='module')
def clips(tiny_transform) -> dict:
    """An image, a clip of four frames, a pair and a clip of three, of 80 x 100 pixels each."""
    rng = np.random.default_rng(0)

    def sample(count, **fields):
        images = [rng.integers(0, 255, (80, 100, 3), dtype=np.uint8) for _ in range(count)]
        masks = [np.zeros((80, 100), bool) for _ in range(count)]
        for t, mask in enumerate(masks):
            mask[10 * t : 10 * t + 20, 30:60] = True
        if count == 4:
            masks[3][:] = False
        return tiny_transform(RegionSample.of_clip(images, masks, **fields))

    return sa2va_collate([sample(1), sample(4), sample(2), sample(3)])


def test_the_frames_of_a_clip_are_in_order(tiny_model, clips):
    encoded = encode(tiny_model, clips)
    assert encoded.image == [0, 1, 2, 3]
    # Second frames come behind the first, the others of clips behind these.
    assert encoded.target_image == [0, 4, 5, 6]
    assert encoded.clip == [[0], [1, 7, 4, 8], [2, 5], [3, 9, 6]]
    assert len(encoded.features) == len(encoded.features.sam) == 7
    assert len(encoded.frames) == 10
    for i, masks in enumerate(encoded.clip_masks):
        rows = [mask.any(0).any(1).nonzero().flatten().tolist() for mask in masks]
        shown = [list(range(10 * t, 10 * t + 20)) for t in range(len(masks))]
        assert rows == ([*shown[:3], []] if i == 1 else shown)
    assert torch.equal(encoded.target_masks[1], encoded.clip_masks[1][2][0])
    assert torch.equal(encoded.target_seg_masks[3], encoded.clip_masks[3][2])


def test_the_features_of_a_clip_are_those_of_its_frames(tiny_model, clips):
    encoded = encode(tiny_model, clips)
    data = clips['data']
    pixels = [*data['g_pixel_values'], *data['pair']['g_pixel_values']]
    pixels += data['clip']['g_pixel_values']
    for k in (1, 4, 7, 8):
        alone = tiny_model.policy.grounding_encoder.encode(pixels[k][None])
        torch.testing.assert_close(
            encoded.frames.stride8[k], alone.stride8[0], atol=1e-5, rtol=1e-4
        )


def test_on_the_target_frame_samples_look_as_they_do_there(tiny_model, clips):
    encoded = encode(tiny_model, clips)
    there = encoded.on_target()
    assert there.image == [0, 4, 5, 6]
    assert there.gt_masks is encoded.target_masks
    assert torch.equal(there.prompt_masks[1], clips['data']['pair']['prompt_masks'][0])
    assert torch.equal(there.prompt_masks[0], encoded.prompt_masks[0])
    part = encoded.subset([1, 3])
    assert part.clip == [[1, 7, 4, 8], [3, 9, 6]]
    assert part.frames is encoded.frames
