# Data of your own in the official fine-tuning format: annotations.json and images/.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import MixedRegionDataset, Sa2VAFinetuneDataset

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
                type=Sa2VAFinetuneDataset,
                repeats=100,  # as officially
                transforms=transform,
            ),
        ],
    ),
)
