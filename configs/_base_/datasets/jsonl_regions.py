# Regions of your own, one JSON object a line: regions.jsonl and the files that it names.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import JSONLRegionDataset, MixedRegionDataset

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

train_dataloader = dict(
    shuffled,
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(type=JSONLRegionDataset, transforms=transform),
        ],
    ),
)
