"""GRPO in both directions on Sa2VA-4B with the language model in 4 bits: for one card of 24 GB.

xtuner train configs/sa2va_4b_dual_loop_qlora.py
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop import *

model['policy']['quantization'] = 'nf4'
