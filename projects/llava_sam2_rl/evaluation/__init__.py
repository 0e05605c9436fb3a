"""mmengine metrics, and the loops that ask the model what they need."""

from .captioning import RegionCaptionMetric
from .cycle import CycleMetric, evaluate_cycle
from .dlc_bench import DLCBenchDataset, DLCBenchMetric
from .loop import BenchmarkTestLoop, BenchmarkValLoop
from .referring import ReferringSegmentationMetric

__all__ = [
    'BenchmarkTestLoop',
    'BenchmarkValLoop',
    'CycleMetric',
    'DLCBenchDataset',
    'DLCBenchMetric',
    'ReferringSegmentationMetric',
    'RegionCaptionMetric',
    'evaluate_cycle',
]
