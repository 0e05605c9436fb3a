# DLC-Bench (nvidia/DLC-Bench): annotations.json, images/, qa.json, class_names.json. The judge is
# an OpenAI-compatible endpoint.
from mmengine.dataset import DefaultSampler

from projects.llava_sam2_rl.datasets import Sa2VATransform, sa2va_collate
from projects.llava_sam2_rl.evaluation import BenchmarkTestLoop, DLCBenchDataset, DLCBenchMetric

test_cfg = dict(type=BenchmarkTestLoop)
test_dataloader = dict(
    batch_size=4,
    num_workers=4,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=sa2va_collate),
    dataset=dict(
        type=DLCBenchDataset,
        data_root='data/DLC-Bench',
        transforms=dict(
            type=Sa2VATransform,
            image_size=448,
            patch_size=14,
            downsample_ratio=0.5,
            grounding_size=1024,
            max_dynamic_patch=12,
        ),
    ),
)
test_evaluator = [
    dict(
        type=DLCBenchMetric,
        questions='data/DLC-Bench/qa.json',
        class_names='data/DLC-Bench/class_names.json',
        judge=dict(
            model='meta-llama/Llama-3.1-8B-Instruct',
            base_url='http://127.0.0.1:8000/v1',
            api_key_env=None,
        ),
    ),
]
