# Captioned regions with pairs from video, and ordinary conversations that ride along with
# cross-entropy, so that the model keeps describing and answering about whole images.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import (
    ConversationDataset,
    DescribeAnythingDataset,
    MixedRegionDataset,
    RefCOCODataset,
    SAVPairsDataset,
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
            dict(type=SAVPairsDataset, repeats=2, transforms=transform),
            dict(
                type=DescribeAnythingDataset,
                split='SAV',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=RefCOCODataset,
                dataset='refcoco',
                split='train',
                repeats=4,
                transforms=transform,
            ),
            dict(type=ConversationDataset, max_samples=60000, transforms=transform),
        ],
    ),
)
