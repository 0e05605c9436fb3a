# Generated scenes and collages of real objects, with and without a second frame.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    GeneratedCollages,
    GeneratedScenes,
    MixedRegionDataset,
)

with read_base():
    from ..loaders import *
    from ..transforms import *

train_dataloader = dict(
    shuffled,
    batch_size=8,
    num_workers=0,
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
            dict(type=GeneratedCollages, length=20000, transforms=transform),
            dict(type=GeneratedCollages, length=4000, paired=True, transforms=transform),
        ],
    ),
)
