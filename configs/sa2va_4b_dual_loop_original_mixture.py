r"""The main config on the mixture of the original plan: SA-V pairs, SA-1B, OpenImages and RefCOCO.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_original_mixture.py \
    --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop import *
    from ._base_.datasets.original_mixture import *
