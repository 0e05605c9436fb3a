# MeViS, the part of the validation split whose masks are public.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import MeViSDataset
from projects.llava_sam2_rl.evaluation import BenchmarkTestLoop, VideoObjectSegmentationMetric

with read_base():
    from ..data_roots import *
    from ..loaders import *

test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(clips_in_order, dataset=dict(type=MeViSDataset, split='valid_u'))
test_evaluator = [dict(type=VideoObjectSegmentationMetric)]
