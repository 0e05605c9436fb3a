"""mmengine metrics."""

from .cycle import CycleMetric, evaluate_cycle

__all__ = ['CycleMetric', 'evaluate_cycle']
