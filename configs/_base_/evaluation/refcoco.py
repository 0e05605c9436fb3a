# RefCOCO: both ways on held-out regions while training, the official evaluation as test.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import MixedRegionDataset, RefCOCODataset
from projects.llava_sam2_rl.engine.loops import DualLoopValLoop
from projects.llava_sam2_rl.evaluation import (
    BenchmarkTestLoop,
    CycleMetric,
    ReferringSegmentationMetric,
)

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

# As often as train_cfg.val_interval says.
val_cfg = dict(type=DualLoopValLoop)
val_dataloader = dict(
    in_order,
    dataset=dict(
        type=RefCOCODataset,
        dataset='refcoco',
        split='val',
        max_samples=256,
        transforms=transform,
    ),
)
val_evaluator = dict(type=CycleMetric)

# As the official evaluation: a sample per expression.
expressions = dict(
    type=RefCOCODataset, dataset='refcoco', per_sentence=True, transforms=test_transform
)
test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    in_order,
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(expressions, split='val', source='refcoco_val'),
            dict(expressions, split='testA', source='refcoco_testA'),
            dict(expressions, split='testB', source='refcoco_testB'),
        ],
    ),
)
test_evaluator = [dict(type=ReferringSegmentationMetric)]
