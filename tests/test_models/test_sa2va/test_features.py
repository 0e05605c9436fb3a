"""Images in an official batch."""

from __future__ import annotations

import pytest
import torch

from projects.llava_sam2_rl.models import VideoLLaVASAMModel


@pytest.fixture(scope='module')
def model() -> VideoLLaVASAMModel:
    torch.manual_seed(0)
    return VideoLLaVASAMModel.from_pretrained('llava_sam2_rl://assets/sa2va_tiny').eval()


def test_a_text_only_sample_is_one_tile_of_zeros_and_has_no_features(model):
    pixels = [torch.randn(2, 3, 96, 96), torch.zeros(1, 3, 96, 96), torch.randn(3, 96, 96)]
    flags = torch.tensor([False, True, False, True])
    features = model.encode_images({'pixel_values': pixels, 'vp_overall_mask': flags})
    assert features.num_tiles == (2, 0, 1)
    assert len(features) == 3
    assert features.vp_mask.tolist() == [False, True, True]
    assert [features.tiles_of(i) for i in range(3)] == [slice(0, 2), slice(2, 2), slice(2, 3)]
    alone = model.encode_images({'pixel_values': pixels[2][None]})
    torch.testing.assert_close(features.vit[2:], alone.vit)
    assert alone.vp_mask is None
    assert alone.sam is None


def test_flags_for_other_tiles_than_there_are(model):
    data = {'pixel_values': [torch.randn(2, 3, 96, 96)], 'vp_overall_mask': torch.tensor([True])}
    with pytest.raises(ValueError, match='1 flags for 2 tiles'):
        model.encode_images(data)


def test_frozen_encoders_keep_no_graph_and_trained_ones_do(model):
    pixels = {'pixel_values': torch.randn(1, 3, 96, 96)}
    assert not model.encode_images(pixels).vit.requires_grad
    trained = VideoLLaVASAMModel.from_pretrained(
        'llava_sam2_rl://assets/sa2va_tiny', trainable=['vision_model']
    )
    assert trained.encode_images(pixels).vit.requires_grad
    with torch.no_grad():
        assert not trained.encode_images(pixels).vit.requires_grad
