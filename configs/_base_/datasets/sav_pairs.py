# SA-V as pairs of 512 x 512 frames, one masklet_data_*.npz per object.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    MixedRegionDataset,
    SAVPairsDataset,
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
            dict(type=SAVPairsDataset, repeats=2, transforms=transform),
        ],
    ),
)
