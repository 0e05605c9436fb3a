"""GRPO on clips of moving scenes with the tiny Sa2VA of this package: minutes on a CPU.

xtuner train configs/sa2va_tiny_dual_loop_clips.py
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_tiny_dual_loop import *
    from ._base_.datasets.moving_scenes import *
