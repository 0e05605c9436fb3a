# Regions with captions, so that both directions learn from every record.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    DescribeAnythingDataset,
    GraspAnyRegionDataset,
    MixedRegionDataset,
    RefCOCODataset,
    ResumableSampler,
    sa2va_collate,
)

with read_base():
    from ..data_roots import *
    from ..transforms import *

described = dict(type=DescribeAnythingDataset, needs_caption=True, transforms=transform)
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    sampler=dict(type=ResumableSampler, shuffle=True, infinite=True),
    collate_fn=dict(type=sa2va_collate),
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
