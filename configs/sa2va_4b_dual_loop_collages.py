r"""The main config on collages of real objects: data without a download.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_collages.py \
    --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop import *
    from ._base_.datasets.collages import *
