"""GRPO in both directions on Sa2VA-1B, otherwise the main config (sa2va_4b_dual_loop.py).

NPROC_PER_NODE=8 xtuner train configs/sa2va_1b_dual_loop.py --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop import *

model['policy']['pretrained'] = 'pretrained/Sa2VA-1B'
