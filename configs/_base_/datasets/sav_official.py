# SA-V as it is released: videos with their masklets (training set).
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import MixedRegionDataset, SAVOfficialDataset

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
                type=SAVOfficialDataset,
                kinds=['manual', 'auto'],
                pair_gap=(4, 96),
                transforms=transform,
            ),
        ],
    ),
)
