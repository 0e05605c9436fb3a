# OpenImages V7 object masks, no captions.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import MixedRegionDataset, OpenImagesDataset

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

train_dataloader = dict(
    shuffled,
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(type=OpenImagesDataset, split='train', transforms=transform),
        ],
    ),
)
