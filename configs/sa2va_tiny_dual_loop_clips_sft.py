"""SFT on clips of moving scenes with the tiny Sa2VA of this package: minutes on a CPU.

The language model is shown all frames of a clip at once, as in the official training on videos.

xtuner train configs/sa2va_tiny_dual_loop_clips_sft.py
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_tiny_dual_loop_sft import *
    from ._base_.datasets.moving_scenes import *
    from ._base_.evaluation.moving_scenes import *
