# DLC-Bench (nvidia/DLC-Bench): annotations.json, images/, qa.json, class_names.json. The judge is
# an OpenAI-compatible endpoint.
from mmengine.config import read_base

from projects.llava_sam2_rl.evaluation import BenchmarkTestLoop, DLCBenchDataset, DLCBenchMetric

with read_base():
    from ..data_roots import *
    from ..loaders import *
    from ..transforms import *

test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    in_order,
    dataset=dict(type=DLCBenchDataset, transforms=test_transform),
)
test_evaluator = [
    dict(
        type=DLCBenchMetric,
        questions='data/DLC-Bench/qa.json',
        class_names='data/DLC-Bench/class_names.json',
        judge=dict(
            model='meta-llama/Llama-3.1-8B-Instruct',
            base_url='http://127.0.0.1:8000/v1',
        ),
    ),
]
