"""GRPO on collages of real objects with the tiny Sa2VA of this package: minutes on a CPU.

The tiny checkpoint has learnt generated scenes and does not know these objects by name: the run
shows that the data works, not that it teaches. sa2va_4b_dual_loop_collages.py is for a real one.

xtuner train configs/sa2va_tiny_dual_loop_collages.py
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_tiny_dual_loop import *
    from ._base_.datasets.collages import *
    from ._base_.evaluation.collages import *
