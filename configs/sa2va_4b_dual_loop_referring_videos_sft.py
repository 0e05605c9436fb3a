r"""SFT on expressions in videos, five frames of each at once as in the official training.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_referring_videos_sft.py \
    --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop_sft import *
    from ._base_.datasets.referring_videos import *
