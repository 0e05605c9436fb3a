"""GRPO in both directions on the tiny Sa2VA of this package: minutes on a CPU.

xtuner train configs/sa2va_tiny_dual_loop.py
"""

from mmengine.config import read_base

from projects.llava_sam2_rl.models import GRPOObjective
from projects.llava_sam2_rl.rewards import CaptionLikelihoodReward, MaskIoUReward

with read_base():
    from ._base_.datasets.scenes_and_collages import *
    from ._base_.default_runtime import *
    from ._base_.evaluation.collages import *
    from ._base_.models.sa2va_tiny import *
    from ._base_.schedules.tiny import *

model['objective'] = dict(
    type=GRPOObjective,
    num_generations=8,
    beta=0.1,
    ref='teacher',
    epsilon_low=0.2,
    epsilon_high=0.2,
    reduction='dapo',
    scale_rewards='batch',
    temperature=1.0,
    mask_to_caption=dict(reward=dict(type=MaskIoUReward)),
    caption_to_mask=dict(
        reward=dict(type=CaptionLikelihoodReward), sigma=0.75, aux_mask_weight=0.5
    ),
)
model['teacher'] = dict(decay=0.999)
optim_wrapper['optimizer'].update(lr=1e-4)
train_cfg.update(default_length=dict(max_iters=200))
param_scheduler.update(warmup_ratio=0.1)
default_hooks['checkpoint'].update(interval=100)
default_hooks['rollouts'].update(interval=20)
