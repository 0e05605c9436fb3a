"""Tiles, frames and several `[SEG]` in one batch, against the official forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from projects.llava_sam2_rl.models import VideoLLaVASAMModel


@pytest.fixture(scope='module')
def tiles(root):
    with np.load(root / 'tests/data/sa2va_tiny_tiles/golden.npz') as arrays:
        return {key: torch.as_tensor(arrays[key]) for key in arrays}


@pytest.fixture(scope='module')
def found(golden_folder, golden_ids, tiles):
    model = VideoLLaVASAMModel.from_pretrained(golden_folder, special_token_ids=golden_ids).eval()
    data = {
        **{key: tiles[key] for key in ('input_ids', 'attention_mask', 'position_ids', 'labels')},
        'pixel_values': [tiles[f'pixel_values_{i}'] for i in range(3)],
        'vp_overall_mask': tiles['vp_overall_mask'],
        'prompt_masks': [tiles['prompt_masks_0'].bool(), tiles['prompt_masks_2'].bool()],
        'g_pixel_values': [*tiles['g_pixel_values_0'], *tiles['g_pixel_values_1']],
        'frames_per_batch': [1, 5],
    }
    with torch.no_grad():
        return model(data, mode='tensor')


def error(ours, official):
    assert ours.shape == official.shape
    return ((ours - official).abs().max() / official.std()).item()


@pytest.mark.parametrize(
    'key', ['image_embeddings', 'logits', 'last_hidden_state', 'seg_embeddings']
)
def test_language_side(found, tiles, key):
    ours, official = found[key], tiles[key]
    if key in ('logits', 'last_hidden_state'):
        real = tiles['attention_mask']
        ours, official = ours[real], official[real]
    assert error(ours, official) < 1e-4


def test_loss(found, tiles):
    assert abs(float(found['loss'] - tiles['loss'])) < 1e-5


@pytest.mark.parametrize('key', ['low_res_masks', 'iou_predictions'])
def test_every_frame_is_prompted_with_every_embedding(found, tiles, key):
    """Frame by frame, objects inside a frame."""
    official = torch.cat([tiles[f'{key}_{i}'].flatten(0, 1) for i in range(2)])
    ours = found[key].squeeze(1) if key == 'low_res_masks' else found[key]
    assert error(ours, official) < 1e-4
