# HaochenWang/Grasp-Any-Region-Dataset: whichever of its Arrow shards are there.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import GraspAnyRegionDataset, MixedRegionDataset

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

train_dataloader = dict(
    shuffled,
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(
                type=GraspAnyRegionDataset,
                parts=['Seed-Dataset*', 'Fine-Grained-Dataset*', 'Relation-Dataset*'],
                whole_images=False,
                max_regions=16,
                needs_caption=True,
                transforms=transform,
            ),
        ],
    ),
)
