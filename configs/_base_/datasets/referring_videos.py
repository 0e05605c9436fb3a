# Expressions in videos, five frames of each: the training sets of MeViS, Ref-YouTube-VOS and ReVOS.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    MeViSDataset,
    MixedRegionDataset,
    ReferringClipDataset,
    RefYouTubeVOSDataset,
    ReVOSDataset,
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
            dict(
                type=ReferringClipDataset,
                dataset=dict(type=MeViSDataset, split='train'),
                num_frames=5,
                transforms=transform,
            ),
            dict(
                type=ReferringClipDataset,
                dataset=dict(type=RefYouTubeVOSDataset, split='train'),
                num_frames=5,
                transforms=transform,
            ),
            dict(
                type=ReferringClipDataset,
                dataset=dict(type=ReVOSDataset, split='train'),
                num_frames=5,
                transforms=transform,
            ),
        ],
    ),
)
