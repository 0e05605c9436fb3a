# Every split of RefCOCO, RefCOCO+ and RefCOCOg, as the official evaluation: a sample per
# expression, up to 12 tiles and the whole image.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import MixedRegionDataset, RefCOCODataset
from projects.llava_sam2_rl.evaluation import BenchmarkTestLoop, ReferringSegmentationMetric

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

expressions = dict(type=RefCOCODataset, per_sentence=True, transforms=test_transform)
test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    in_order,
    dataset=dict(
        type=MixedRegionDataset,
        datasets=[
            dict(expressions, dataset='refcoco', split='val', source='refcoco_val'),
            dict(expressions, dataset='refcoco', split='testA', source='refcoco_testA'),
            dict(expressions, dataset='refcoco', split='testB', source='refcoco_testB'),
            dict(expressions, dataset='refcoco+', split='val', source='refcoco+_val'),
            dict(expressions, dataset='refcoco+', split='testA', source='refcoco+_testA'),
            dict(expressions, dataset='refcoco+', split='testB', source='refcoco+_testB'),
            dict(expressions, dataset='refcocog', split='val', source='refcocog_val'),
            dict(expressions, dataset='refcocog', split='test', source='refcocog_test'),
        ],
    ),
)
test_evaluator = [dict(type=ReferringSegmentationMetric)]
