# The mixture of the original plan: 4 226 551 records an epoch with its downloads.
from projects.llava_sam2_rl.datasets import (
    MixedRegionDataset,
    OpenImagesDataset,
    RefCOCODataset,
    SA1BDataset,
    SAVPairsDataset,
    Sa2VATransform,
    ResumableSampler,
    sa2va_collate,
)

transform = dict(
    type=Sa2VATransform,
    image_size=448,
    patch_size=14,
    downsample_ratio=0.5,
    grounding_size=1024,
    max_dynamic_patch=1,
)
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    sampler=dict(type=ResumableSampler, shuffle=True, infinite=True),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(
                type=SAVPairsDataset,
                data_root='data/sav_pairs',
                repeats=2,
                transforms=transform,
            ),
            dict(
                type=SA1BDataset,
                data_root='data/sa1b',
                min_area=0.001,
                predicted_iou=0.88,
                stability_score=0.92,
                transforms=transform,
            ),
            dict(
                type=OpenImagesDataset,
                data_root='data/openimages',
                split='train',
                transforms=transform,
            ),
            dict(
                type=RefCOCODataset,
                data_root='data/refer_seg',
                dataset='refcoco',
                split='train',
                split_by='unc',
                image_dir='images/train2014',
                repeats=4,
                transforms=transform,
            ),
        ],
    ),
)
