# Generated scenes, with and without a second frame, and the photographs of scikit-image.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import GeneratedScenes, MixedRegionDataset, Photographs

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
            dict(type=Photographs, repeats=50, transforms=transform),
        ],
    ),
)
