# Objects of your own in COCO form: annotations.json, captions.csv by annotation id, images/.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import COCORegionDataset, MixedRegionDataset

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

train_dataloader = dict(
    shuffled,
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(type=COCORegionDataset, transforms=transform),
        ],
    ),
)
