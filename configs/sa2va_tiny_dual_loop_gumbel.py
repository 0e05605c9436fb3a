"""The differentiable caption on the tiny Sa2VA of this package: minutes on a CPU.

xtuner train configs/sa2va_tiny_dual_loop_gumbel.py
"""

from mmengine.config import read_base

from projects.llava_sam2_rl.models import GumbelObjective

with read_base():
    from ._base_.datasets.scenes_and_photographs import *
    from ._base_.default_runtime import *
    from ._base_.models.sa2va_tiny import *
    from ._base_.schedules.tiny import *

model['objective'] = dict(type=GumbelObjective, tau=1.0, top_k=512, mask_ratio=0.25)
model['caption_to_mask'] = dict(weight=0.5)
