"""What the tests of batches share."""

from __future__ import annotations

from typing import Any

import torch

from projects.llava_sam2_rl.models import DualLoopModel
from projects.llava_sam2_rl.models.batch import RegionBatch


def encode(model: DualLoopModel, batch: dict) -> RegionBatch:
    """A collated batch with its images encoded, by the names of its samples."""
    return model.encode(batch['data'], [meta.name for meta in batch['data_samples']])


def only(batch: dict, i: int) -> dict[str, Any]:
    """Sample ``i`` by itself, collated as if it had come alone."""
    data, pair = batch['data'], batch['data']['pair']
    single = {key: [data[key][i]] for key in ('pixel_values', 'g_pixel_values', 'prompt_masks')}
    single.update(masks=[data['masks'][i]], captions=[data['captions'][i]], pair=None)
    single['vp_overall_mask'] = torch.tensor([True])
    if i in pair['index'].tolist():
        k = pair['index'].tolist().index(i)
        keys = ('pixel_values', 'g_pixel_values', 'prompt_masks', 'masks')
        single['pair'] = {
            **{key: [pair[key][k]] for key in keys},
            'index': torch.tensor([0]),
            'vp_overall_mask': torch.tensor([True]),
        }
    return {'data': single, 'data_samples': [batch['data_samples'][i]]}


def randomize_lora(policy: torch.nn.Module, std: float = 1.0) -> None:
    """Makes the policy differ from the teacher: peft starts LoRA as no change at all."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if 'lora_B' in name:
                parameter.normal_(std=std)
