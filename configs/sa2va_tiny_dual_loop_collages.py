"""GRPO on collages of real objects alone with the tiny Sa2VA of this package: minutes on a CPU.

xtuner train configs/sa2va_tiny_dual_loop_collages.py
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_tiny_dual_loop import *
    from ._base_.datasets.collages import *
