# A folder of your own: NAME.jpg, NAME.mask*.png, NAME*.txt.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import FolderRegionDataset, MixedRegionDataset

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

train_dataloader = dict(
    shuffled,
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(type=FolderRegionDataset, transforms=transform),
        ],
    ),
)
