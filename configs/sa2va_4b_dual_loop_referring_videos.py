r"""The main config on expressions in videos; a caption is asked of a clip's first frame.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_referring_videos.py \
    --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_4b_dual_loop import *
    from ._base_.datasets.referring_videos import *
