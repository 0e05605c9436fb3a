# RefCOCO as it is distributed: refs(unc).p, instances.json and COCO's train2014.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import MixedRegionDataset, RefCOCODataset

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
                type=RefCOCODataset,
                dataset='refcoco',
                split='train',
                repeats=4,
                transforms=transform,
            ),
        ],
    ),
)
