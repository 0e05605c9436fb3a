# Generated scenes, with and without a second frame, and the photographs of scikit-image.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    GeneratedScenes,
    MixedRegionDataset,
    Photographs,
    ResumableSampler,
    sa2va_collate,
)

with read_base():
    from ..transforms import *

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type=ResumableSampler, shuffle=True, infinite=True),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(type=GeneratedScenes, length=20000, transforms=transform),
            dict(
                type=GeneratedScenes,
                length=4000,
                paired=True,
                max_shift=0.05,
                transforms=transform,
            ),
            dict(type=Photographs, repeats=50, transforms=transform),
        ],
    ),
)
