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
