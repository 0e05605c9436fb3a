# Captioned regions with pairs from video, and ordinary conversations that ride along with
# cross-entropy, so that the model keeps describing and answering about whole images.
from projects.llava_sam2_rl.datasets import (
    ConversationDataset,
    DescribeAnythingDataset,
    MixedRegionDataset,
    RefCOCODataset,
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
                type=DescribeAnythingDataset,
                data_root='data/describe-anything-dataset',
                split='SAV',
                needs_caption=True,
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
            dict(
                type=ConversationDataset,
                ann_file='data/llava/llava_v1_5_mix665k.json',
                image_dir='data/llava/images',
                max_samples=60000,
                transforms=transform,
            ),
        ],
    ),
)
