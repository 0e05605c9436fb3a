# SA-1B masks, no captions; the filters are those of its own release.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import MixedRegionDataset, SA1BDataset

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
                type=SA1BDataset,
                min_area=0.001,
                predicted_iou=0.88,
                stability_score=0.92,
                transforms=transform,
            ),
        ],
    ),
)
