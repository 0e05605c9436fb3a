"""Sizes stand in the checkpoint; what a config gives itself is checked against it."""

from __future__ import annotations

import json

import pytest

from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.pretrained import (
    complete_sizes,
    image_sizes,
    read_config,
    resolve,
)

TINY = 'llava_sam2_rl://assets/sa2va_tiny'


def test_the_checkpoint_alone_gives_every_size():
    sizes = complete_sizes(TINY, {'lora': {'r': 4}})
    config = json.loads((resolve(TINY) / 'config.json').read_text())
    assert sizes == {
        key: value for key, value in config.items() if key not in ('model_type', 'architectures')
    }
    assert image_sizes(sizes) == {
        'image_size': 96,
        'patch_size': 8,
        'downsample_ratio': 0.5,
        'grounding_size': 128,
    }


def test_what_is_given_wins_and_a_section_in_part_is_completed():
    sizes = complete_sizes(TINY, {'select_layer': -2, 'llm_config': {'rope_theta': 5.0}})
    assert sizes['select_layer'] == -2
    read = read_config(resolve(TINY))['llm_config']
    assert sizes['llm_config'] == {**read, 'rope_theta': 5.0}


def test_neither_says():
    sizes = complete_sizes(None, {'vision_config': {'patch_size': 14}, 'llm_config': {}})
    assert (sizes['template'], sizes['select_layer'], sizes['ps_version']) == (
        'phi3_chat',
        -1,
        'v2',
    )
    assert 'grounding_encoder_config' not in sizes
    assert image_sizes(sizes) == {
        'image_size': 448,
        'patch_size': 14,
        'downsample_ratio': 0.5,
        'grounding_size': 1024,
    }
    with pytest.raises(ValueError, match='vision_config and llm_config must be given'):
        complete_sizes(None, {})
    with pytest.raises(ValueError, match='^llm_config must be given'):
        complete_sizes(None, {'vision_config': {}})


@pytest.mark.parametrize(
    ('section', 'key', 'value'),
    [('vision_config', 'hidden_size', 1024), ('llm_config', 'architectures', ['Phi3ForCausalLM'])],
)
def test_a_given_size_of_another_model(section, key, value):
    with pytest.raises(CheckpointError, match=rf'{section}\.{key} is .* leave {section} out'):
        VideoLLaVASAMModel(pretrained=TINY, **{section: {key: value}})


def test_the_model_takes_them_from_its_checkpoint():
    model = VideoLLaVASAMModel(pretrained=TINY)
    assert model.config == {
        'model_type': 'sa2va_chat',
        'architectures': ['Sa2VAChatModel'],
        **complete_sizes(TINY, {}),
    }
