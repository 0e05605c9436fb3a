# Regions of your own in a data set of Hugging Face's `datasets`, saved to disk or as parquet.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import HuggingFaceRegionDataset, MixedRegionDataset

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
                type=HuggingFaceRegionDataset,
                # Columns.
                image='image',
                mask='mask',
                caption='caption',
                transforms=transform,
            ),
        ],
    ),
)
