r"""The main config on captioned regions, pairs from video, and ordinary conversations.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_multi_task_mixture.py \
    --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop import *
    from ._base_.datasets.multi_task_mixture import *
