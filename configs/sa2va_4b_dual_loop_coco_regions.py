r"""The main config on objects of your own in COCO form.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_coco_regions.py \
    --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop import *
    from ._base_.datasets.coco_regions import *
