r"""The main config on every captioned source: describe-anything, Grasp-Any-Region and RefCOCO.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_captioned_mixture.py \
    --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop import *
    from ._base_.datasets.captioned_mixture import *
