"""GRPO in both directions on Sa2VA-InternVL3-8B, otherwise the main config (sa2va_4b_dual_loop.py).

NPROC_PER_NODE=8 xtuner train configs/sa2va_internvl3_8b_dual_loop.py --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop import *

model['policy']['pretrained'] = 'pretrained/Sa2VA-InternVL3-8B'
# The official recipe's rank for this size.
model['policy']['lora'].update(r=256, lora_alpha=512)
