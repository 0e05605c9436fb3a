# SA-1B masks, no captions; the filters are those of its own release.
from projects.llava_sam2_rl.datasets import (
    MixedRegionDataset,
    SA1BDataset,
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
                type=SA1BDataset,
                data_root='data/sa1b',
                min_area=0.001,
                predicted_iou=0.88,
                stability_score=0.92,
                transforms=transform,
            ),
        ],
    ),
)
