# Region captioning on the validation split of RefCOCOg.
from mmengine.config import read_base
from mmengine.dataset import DefaultSampler

from projects.llava_sam2_rl.datasets import RefCOCODataset, sa2va_collate
from projects.llava_sam2_rl.evaluation import BenchmarkTestLoop, RegionCaptionMetric

with read_base():
    from ..data_roots import *
    from ..transforms import *

test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    batch_size=4,
    num_workers=4,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(
        type=RefCOCODataset,
        dataset='refcocog',
        split='val',
        per_sentence=True,
        source='refcocog_val',
        transforms=test_transform,
    ),
)
test_evaluator = [dict(type=RegionCaptionMetric)]
