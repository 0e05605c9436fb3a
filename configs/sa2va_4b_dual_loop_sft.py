"""SFT on Sa2VA-4B with RefCOCO.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_sft.py --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.refcoco import *
    from ._base_.default_runtime import *
    from ._base_.evaluation.refcoco import *
    from ._base_.models.sa2va_4b import *
    from ._base_.schedules.sa2va_4b import *
