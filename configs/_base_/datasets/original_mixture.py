# The mixture of the original plan: 4 226 551 records an epoch with its downloads.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    MixedRegionDataset,
    OpenImagesDataset,
    RefCOCODataset,
    SA1BDataset,
    SAVPairsDataset,
)

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

train_dataloader = dict(
    shuffled,
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(type=SAVPairsDataset, repeats=2, transforms=transform),
            dict(
                type=SA1BDataset,
                min_area=0.001,
                predicted_iou=0.88,
                stability_score=0.92,
                transforms=transform,
            ),
            dict(type=OpenImagesDataset, split='train', transforms=transform),
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
