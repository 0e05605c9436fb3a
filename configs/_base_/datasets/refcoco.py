# RefCOCO as it is distributed: refs(unc).p, instances.json and COCO's train2014.
from mmengine.dataset import DefaultSampler
from mmengine.runner import ValLoop

from projects.llava_sam2_rl.datasets import (
    MixedRegionDataset,
    RefCOCODataset,
    Sa2VATransform,
    ResumableSampler,
    sa2va_collate,
)
from projects.llava_sam2_rl.evaluation import (
    BenchmarkTestLoop,
    CycleMetric,
    ReferringSegmentationMetric,
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

# Both ways on held-out regions, as often as train_cfg.val_interval says.
val_cfg = dict(type=ValLoop)
val_dataloader = dict(
    batch_size=4,
    num_workers=4,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(
        type=RefCOCODataset,
        data_root='data/refer_seg',
        dataset='refcoco',
        split='val',
        split_by='unc',
        image_dir='images/train2014',
        max_samples=256,
        transforms=transform,
    ),
)
val_evaluator = dict(type=CycleMetric)

# As the official evaluation: a sample per expression, up to 12 tiles and the whole image.
test_transform = dict(
    type=Sa2VATransform,
    image_size=448,
    patch_size=14,
    downsample_ratio=0.5,
    grounding_size=1024,
    max_dynamic_patch=12,
)
test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    batch_size=4,
    num_workers=4,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(
                type=RefCOCODataset,
                data_root='data/refer_seg',
                dataset='refcoco',
                split='val',
                split_by='unc',
                image_dir='images/train2014',
                per_sentence=True,
                source='refcoco_val',
                transforms=test_transform,
            ),
            dict(
                type=RefCOCODataset,
                data_root='data/refer_seg',
                dataset='refcoco',
                split='testA',
                split_by='unc',
                image_dir='images/train2014',
                per_sentence=True,
                source='refcoco_testA',
                transforms=test_transform,
            ),
            dict(
                type=RefCOCODataset,
                data_root='data/refer_seg',
                dataset='refcoco',
                split='testB',
                split_by='unc',
                image_dir='images/train2014',
                per_sentence=True,
                source='refcoco_testB',
                transforms=test_transform,
            ),
        ],
    ),
)
test_evaluator = [dict(type=ReferringSegmentationMetric)]
