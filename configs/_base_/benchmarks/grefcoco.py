# gRefCOCO as the official evaluation: a sample per expression, up to 12 tiles and the whole image;
# expressions may refer to several objects or to none.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import GRefCOCODataset, MixedRegionDataset
from projects.llava_sam2_rl.evaluation import BenchmarkTestLoop, ReferringSegmentationMetric

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

expressions = dict(type=GRefCOCODataset, per_sentence=True, transforms=test_transform)
test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    in_order,
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(expressions, split='val', source='grefcoco_val'),
            dict(expressions, split='testA', source='grefcoco_testA'),
            dict(expressions, split='testB', source='grefcoco_testB'),
        ],
    ),
)
test_evaluator = [dict(type=ReferringSegmentationMetric)]
