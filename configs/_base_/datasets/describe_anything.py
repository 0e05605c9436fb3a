# nvidia/describe-anything-dataset, one source per split.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    DescribeAnythingDataset,
    MixedRegionDataset,
    ResumableSampler,
    sa2va_collate,
)

with read_base():
    from ..data_roots import *
    from ..transforms import *

train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    sampler=dict(type=ResumableSampler, shuffle=True, infinite=True),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(
                type=DescribeAnythingDataset,
                split='SAV',
                pair_gap=(1, None),
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                split='COCOStuff',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                split='LVIS',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                split='Mapillary',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                split='OpenImages',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                split='PACO',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                split='SAM',
                needs_caption=True,
                transforms=transform,
            ),
        ],
    ),
)
