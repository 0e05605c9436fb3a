# SA-V as pairs of 512 x 512 frames, one masklet_data_*.npz per object.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import MixedRegionDataset, SAVPairsDataset

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
        ],
    ),
)
