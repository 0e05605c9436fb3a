# nvidia/describe-anything-dataset, one source per split.
from projects.llava_sam2_rl.datasets import (
    DescribeAnythingDataset,
    MixedRegionDataset,
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
                type=DescribeAnythingDataset,
                data_root='data/describe-anything-dataset',
                split='SAV',
                pair_gap=(1, None),
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                data_root='data/describe-anything-dataset',
                split='COCOStuff',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                data_root='data/describe-anything-dataset',
                split='LVIS',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                data_root='data/describe-anything-dataset',
                split='Mapillary',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                data_root='data/describe-anything-dataset',
                split='OpenImages',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                data_root='data/describe-anything-dataset',
                split='PACO',
                needs_caption=True,
                transforms=transform,
            ),
            dict(
                type=DescribeAnythingDataset,
                data_root='data/describe-anything-dataset',
                split='SAM',
                needs_caption=True,
                transforms=transform,
            ),
        ],
    ),
)
