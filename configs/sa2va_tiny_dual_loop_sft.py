"""SFT on the tiny Sa2VA of this package: the same code path as 4B, minutes on a CPU.

xtuner train configs/sa2va_tiny_dual_loop_sft.py
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.scenes_and_collages import *
    from ._base_.default_runtime import *
    from ._base_.evaluation.collages import *
    from ._base_.models.sa2va_tiny import *
    from ._base_.schedules.tiny import *

default_hooks['checkpoint'].update(interval=100)
