# Ref-YouTube-VOS, validation split: its masks are on a server, PNG files are written to hand in.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import RefYouTubeVOSDataset
from projects.llava_sam2_rl.evaluation import BenchmarkTestLoop, VideoObjectSegmentationMetric

with read_base():
    from ..data_roots import *
    from ..loaders import *

test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(clips_in_order, dataset=dict(type=RefYouTubeVOSDataset))
test_evaluator = [dict(type=VideoObjectSegmentationMetric, submission=True)]
