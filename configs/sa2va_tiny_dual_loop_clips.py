"""GRPO on clips of moving scenes with the tiny Sa2VA of this package: minutes on a CPU.

Masks are carried through the clips by SAM 2's memory: a caption is as good as the mean IoU over
all frames, a mask as well as the teacher can tell from a later frame what it was of.

xtuner train configs/sa2va_tiny_dual_loop_clips.py
"""

from mmengine.config import read_base

with read_base():
    from .sa2va_tiny_dual_loop import *
    from ._base_.datasets.moving_scenes import *
    from ._base_.evaluation.moving_scenes import *

model['objective']['mask_to_caption'].update(return_trip='propagate')
model['objective']['caption_to_mask'].update(return_trip='propagate')
