"""GRPO in both directions on Sa2VA-4B: the main config. Needs the weights and RefCOCO.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop.py --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

from projects.llava_sam2_rl.models import GRPOObjective
from projects.llava_sam2_rl.rewards import MaskIoUReward, MeteorReward

with read_base():
    from ._base_.datasets.refcoco import *
    from ._base_.default_runtime import *
    from ._base_.evaluation.refcoco import *
    from ._base_.models.sa2va_4b import *
    from ._base_.schedules.sa2va_4b import *

model['objective'] = dict(
    type=GRPOObjective,
    num_generations=4,
    beta=0.1,
    ref='teacher',
    epsilon_low=0.2,
    epsilon_high=0.2,
    reduction='dapo',
    temperature=1.0,
    mask_to_caption=dict(reward=dict(type=MaskIoUReward)),
    caption_to_mask=dict(reward=dict(type=MeteorReward), sigma=0.5, aux_mask_weight=1.0),
)
