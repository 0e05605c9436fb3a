# Generated scenes, with and without a second frame, and the photographs of scikit-image.
from mmengine.dataset import DefaultSampler

from projects.llava_sam2_rl.datasets import (
    GeneratedScenes,
    MixedRegionDataset,
    Photographs,
    Sa2VATransform,
    ResumableSampler,
    sa2va_collate,
)
from projects.llava_sam2_rl.evaluation import (
    BenchmarkTestLoop,
    CycleMetric,
    ReferringSegmentationMetric,
    RegionCaptionMetric,
)

tiny_transform = dict(
    type=Sa2VATransform,
    image_size=96,
    patch_size=8,
    downsample_ratio=0.5,
    grounding_size=128,
    max_dynamic_patch=1,
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type=ResumableSampler, shuffle=True, infinite=True),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(type=GeneratedScenes, length=20000, transforms=tiny_transform),
            dict(
                type=GeneratedScenes,
                length=4000,
                paired=True,
                max_shift=0.05,
                transforms=tiny_transform,
            ),
            dict(type=Photographs, repeats=50, transforms=tiny_transform),
        ],
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(type=GeneratedScenes, length=256, split='val', transforms=tiny_transform),
)
val_evaluator = dict(type=CycleMetric)
test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(type=GeneratedScenes, length=256, split='val', transforms=tiny_transform),
)
test_evaluator = [
    dict(type=ReferringSegmentationMetric),
    dict(type=RegionCaptionMetric),
    dict(type=CycleMetric),
]
