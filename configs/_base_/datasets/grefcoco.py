# gRefCOCO: expressions that refer to one object, to several or to none; COCO's train2014.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import GRefCOCODataset, MixedRegionDataset

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
                type=GRefCOCODataset,
                split='train',
                transforms=transform,
            ),
        ],
    ),
)
