"""mmengine metrics, and the loops that ask the model what they need."""

from projects.llava_sam2_rl.evaluation.benchmark_loops import BenchmarkTestLoop, BenchmarkValLoop
from projects.llava_sam2_rl.evaluation.best_of_n import BestOfNMetric
from projects.llava_sam2_rl.evaluation.captioning import RegionCaptionMetric
from projects.llava_sam2_rl.evaluation.cycle import CycleMetric, evaluate_cycle
from projects.llava_sam2_rl.evaluation.dlc_bench import DLCBenchDataset, DLCBenchMetric
from projects.llava_sam2_rl.evaluation.grounded_captions import greedy_mask_miou
from projects.llava_sam2_rl.evaluation.referring import ReferringSegmentationMetric
from projects.llava_sam2_rl.evaluation.tasks import TaskMetric
from projects.llava_sam2_rl.evaluation.video_segmentation import VideoObjectSegmentationMetric

__all__ = [
    'BenchmarkTestLoop',
    'BenchmarkValLoop',
    'BestOfNMetric',
    'CycleMetric',
    'DLCBenchDataset',
    'DLCBenchMetric',
    'ReferringSegmentationMetric',
    'RegionCaptionMetric',
    'TaskMetric',
    'VideoObjectSegmentationMetric',
    'evaluate_cycle',
    'greedy_mask_miou',
]
