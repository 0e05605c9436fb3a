# A folder of your own: NAME.jpg, NAME.mask*.png, NAME*.txt.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    FolderRegionDataset,
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
            dict(type=FolderRegionDataset, transforms=transform),
        ],
    ),
)
