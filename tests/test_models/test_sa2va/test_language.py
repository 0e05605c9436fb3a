"""Activation checkpointing keeps of each layer its input alone, whatever mode the model is in."""

from __future__ import annotations

import pytest
import torch

from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel

WIDTH, ROWS, LENGTH = 128, 2, 50


def build(tiny_config, architecture: str, layers: int, checkpointing: bool) -> VideoLLaVASAMModel:
    config = dict(tiny_config.model.policy)
    config.pop('type')
    sizes = dict(
        config['llm_config'],
        architectures=[architecture],
        num_hidden_layers=layers,
        pad_token_id=0,
    )
    for key in ('model_type', 'layer_types', 'max_window_layers'):
        sizes.pop(key, None)
    config.update(llm_config=sizes, pretrained=None, gradient_checkpointing=checkpointing)
    config['tokenizer'] = 'llava_sam2_rl://assets/sa2va_tiny'
    return VideoLLaVASAMModel(**config)


def saved_bytes(model: VideoLLaVASAMModel) -> int:
    """What a pass with gradients keeps for the backward pass, parameters left out."""
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive, sizes = [], {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        alive.append(x)  # so that no address is used again
        storage = x.untyped_storage()
        if storage.data_ptr() not in ours:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    embeds = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[0, :7] = False
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model.hidden_states(embeds, mask)
    hidden.sum().backward()
    assert embeds.grad[mask].abs().max() > 0
    assert embeds.grad.isfinite().all()
    return sum(sizes.values())


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(
    'architecture', ['Qwen2ForCausalLM', 'Phi3ForCausalLM', 'InternLM2ForCausalLM']
)
def test_each_layer_more_keeps_its_input_more(tiny_config, architecture, training):
    """In eval mode as GRPO's pass with gradients is, and in training mode."""
    per_layer = {}
    for checkpointing in (False, True):
        few, many = (
            saved_bytes(build(tiny_config, architecture, layers, checkpointing).train(training))
            for layers in (2, 5)
        )
        per_layer[checkpointing] = (many - few) / 3
    # A layer's input in float32. With dropout the state of its random numbers comes on top.
    one_input = ROWS * LENGTH * WIDTH * 4
    assert one_input <= per_layer[True] <= 1.2 * one_input
    assert per_layer[False] > 10 * one_input


def test_a_pass_leaves_every_mode_as_it_was(tiny_config):
    model = build(tiny_config, 'Qwen2ForCausalLM', 2, True)
    for mode in (False, True):
        model.train(mode)
        before = [module.training for module in model.modules()]
        saved_bytes(model)
        assert [module.training for module in model.modules()] == before
