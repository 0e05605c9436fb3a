"""Under autocast, as `AmpOptimWrapper` trains, gradients reach what is trained."""

from __future__ import annotations

import copy

import pytest
import torch

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.models import GRPOObjective, GumbelObjective, SFTObjective
from projects.llava_sam2_rl.registry import MODELS

PARTS = ('mlp1', 'lora_A', 'lora_B', 'text_hidden_fcs', 'sam_mask_decoder')


@pytest.fixture(scope='module')
def batch(tiny_transform) -> dict:
    scenes = GeneratedScenes(length=8, split='val', transforms=tiny_transform)
    return sa2va_collate([scenes[0], scenes[1]])


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('objective', [GRPOObjective, GumbelObjective, SFTObjective])
def test_every_trained_part_learns(tiny_config, batch, objective, checkpointing):
    config = copy.deepcopy(tiny_config.model)
    config.policy.update(gradient_checkpointing=checkpointing)
    config.update(objective=objective(), max_new_tokens=8)
    torch.manual_seed(0)
    model = MODELS.build(config).train()
    for name, parameter in model.policy.named_parameters():
        if 'lora_B' in name:  # zero at the start, and then lora_A has no gradient
            torch.nn.init.normal_(parameter, std=0.05)
    # What runs without gradient first must not leave its casts of the weights to what comes then.
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(**batch, mode='loss')
    sum(losses.values()).backward()
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in model.policy.named_parameters():
        for part in PARTS:
            if part in name and parameter.grad is not None:
                found[part] += bool(parameter.grad.abs().max() > 0)
    assert all(found.values()), found
    # q, k, v, o, gate, up and down of three layers; of the last one all but what comes behind the
    # attention matter as well.
    assert found['lora_B'] == found['lora_A'] == 21, found
