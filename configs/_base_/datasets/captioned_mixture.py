# Regions with captions, so that both directions learn from every record.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    DescribeAnythingDataset,
    GraspAnyRegionDataset,
    MixedRegionDataset,
    RefCOCODataset,
)

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

described = dict(type=DescribeAnythingDataset, needs_caption=True, transforms=transform)
train_dataloader = dict(
    shuffled,
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(described, split='SAV'),
            dict(described, split='COCOStuff'),
            dict(described, split='LVIS'),
            dict(described, split='Mapillary'),
            dict(described, split='OpenImages'),
            dict(described, split='PACO'),
            dict(described, split='SAM'),
            dict(type=GraspAnyRegionDataset, needs_caption=True, transforms=transform),
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
