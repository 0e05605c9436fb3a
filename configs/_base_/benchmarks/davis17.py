# Ref-DAVIS17, validation split, as the official evaluation: mean over expressions.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import RefDAVIS17Dataset
from projects.llava_sam2_rl.evaluation import BenchmarkTestLoop, VideoObjectSegmentationMetric

with read_base():
    from ..data_roots import *
    from ..loaders import *

test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(clips_in_order, dataset=dict(type=RefDAVIS17Dataset))
test_evaluator = [dict(type=VideoObjectSegmentationMetric)]
