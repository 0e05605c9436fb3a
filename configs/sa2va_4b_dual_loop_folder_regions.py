r"""The main config on a folder of pictures with masks and captions beside them.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_folder_regions.py \
    --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop import *
    from ._base_.datasets.folder_regions import *
