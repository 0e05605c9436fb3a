# Collages of objects in sizes and places that training does not show, for validation and test.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import GeneratedCollages
from projects.llava_sam2_rl.engine.loops import DualLoopValLoop
from projects.llava_sam2_rl.evaluation import (
    BenchmarkTestLoop,
    CycleMetric,
    ReferringSegmentationMetric,
    RegionCaptionMetric,
)

with read_base():
    from ..loaders import *
    from ..transforms import *

val_cfg = dict(type=DualLoopValLoop)
val_dataloader = dict(
    in_order,
    batch_size=32,
    num_workers=0,
    dataset=dict(type=GeneratedCollages, length=256, split='val', transforms=transform),
)
val_evaluator = dict(type=CycleMetric)
test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    in_order,
    batch_size=32,
    num_workers=0,
    dataset=dict(type=GeneratedCollages, length=256, split='val', transforms=transform),
)
test_evaluator = [
    dict(type=ReferringSegmentationMetric),
    dict(type=RegionCaptionMetric),
    dict(type=CycleMetric),
]
