"""The differentiable caption on Sa2VA-4B with RefCOCO.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_gumbel.py --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

from projects.llava_sam2_rl.models import GumbelObjective

with read_base():
    from ._base_.datasets.refcoco import *
    from ._base_.default_runtime import *
    from ._base_.evaluation.refcoco import *
    from ._base_.models.sa2va_4b import *
    from ._base_.schedules.sa2va_4b import *

model['objective'] = dict(
    type=GumbelObjective, tau=1.0, top_k=512, mask_ratio=0.25, return_weight=0.2, beta=0.1
)
model['caption_to_mask'] = dict(weight=0.5)
