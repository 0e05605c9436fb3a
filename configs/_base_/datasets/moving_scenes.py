# Generated scenes, as pictures and as clips whose objects move, hide one another, cross and leave.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    GeneratedMovingScenes,
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
            dict(type=GeneratedScenes, length=4000, transforms=transform),
            dict(type=GeneratedMovingScenes, length=8000, num_frames=4, transforms=transform),
        ],
    ),
)
