"""Images in an official batch."""

from __future__ import annotations

import pytest
import torch

from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.sa2va import features


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


def test_encoders_see_a_bounded_number_of_pixels_at_a_time(model, monkeypatch):
    """Parts of two tiles give what all five give at once; with gradients nothing is split."""
    policy = model
    side, grounding = policy.config['force_image_size'], policy.grounding_encoder.image_size
    generator = torch.Generator().manual_seed(0)
    data = {
        'pixel_values': [torch.randn(5, 3, side, side, generator=generator)],
        'g_pixel_values': [torch.randint(0, 256, (3, grounding, grounding), dtype=torch.uint8)] * 5,
    }
    seen: list[int] = []
    hook = policy.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs['pixel_values'])), with_kwargs=True
    )
    try:
        with torch.no_grad():
            whole = policy.encode_images(data)
            monkeypatch.setattr(features, 'PIXELS_AT_A_TIME', 2 * side**2)
            parts = policy.encode_images(data)
    finally:
        hook.remove()
    assert seen == [5, 2, 2, 1]
    torch.testing.assert_close(parts.vit, whole.vit, rtol=1e-4, atol=1e-5)
    for name in ('embedding', 'stride4', 'stride8'):
        torch.testing.assert_close(
            getattr(parts.sam, name), getattr(whole.sam, name), rtol=1e-4, atol=1e-4
        )


def test_tiles_of_another_size_are_refused_before_they_are_encoded(model):
    # 448 px on the tiny model: 3136 tokens that attend to each other, gigabytes for one batch.
    data = {'pixel_values': [torch.ones(1, 3, 448, 448)]}
    with pytest.raises(
        ValueError, match=r'tiles of \(448, 448\) pixels, this model takes \(96, 96'
    ):
        model.encode_images(data, grounding=False)
