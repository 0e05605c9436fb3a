# Region captioning on the validation split of RefCOCOg.
from mmengine.dataset import DefaultSampler

from projects.llava_sam2_rl.datasets import RefCOCODataset, Sa2VATransform, sa2va_collate
from projects.llava_sam2_rl.evaluation import BenchmarkTestLoop, RegionCaptionMetric

test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    batch_size=4,
    num_workers=4,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(
        type=RefCOCODataset,
        data_root='data/refer_seg',
        dataset='refcocog',
        split='val',
        image_dir='images/train2014',
        per_sentence=True,
        source='refcocog_val',
        transforms=dict(
            type=Sa2VATransform,
            image_size=448,
            patch_size=14,
            downsample_ratio=0.5,
            grounding_size=1024,
            max_dynamic_patch=12,
        ),
    ),
)
test_evaluator = [dict(type=RegionCaptionMetric)]
