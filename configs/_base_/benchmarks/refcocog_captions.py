# Region captioning on the validation split of RefCOCOg.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import RefCOCODataset
from projects.llava_sam2_rl.evaluation import BenchmarkTestLoop, RegionCaptionMetric

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    in_order,
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
