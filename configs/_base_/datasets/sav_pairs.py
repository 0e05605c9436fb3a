# SA-V as pairs of 512 x 512 frames, one masklet_data_*.npz per object.
from projects.llava_sam2_rl.datasets import (
    MixedRegionDataset,
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
        ],
    ),
)
