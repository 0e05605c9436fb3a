"""The differentiable caption on the tiny Sa2VA of this package: minutes on a CPU.

xtuner train configs/sa2va_tiny_dual_loop_gumbel.py
"""

from mmengine.config import read_base

from projects.llava_sam2_rl.models import GumbelObjective

with read_base():
    from ._base_.datasets.scenes_and_collages import *
    from ._base_.default_runtime import *
    from ._base_.evaluation.collages import *
    from ._base_.models.sa2va_tiny import *
    from ._base_.schedules.tiny import *

# Captions of the tiny model stop early: a position the teacher does not write cannot be learnt.
model['objective'] = dict(
    type=GumbelObjective,
    tau=1.0,
    top_k=512,
    mask_ratio=0.25,
    min_pseudo_tokens=8,
    return_weight=0.1,
    beta=0.3,
)
model['caption_to_mask'] = dict(weight=0.5)
model['teacher'] = dict(decay=0.999)
optim_wrapper['optimizer'].update(lr=1e-4)
train_cfg.update(default_length=dict(max_iters=200))
param_scheduler.update(warmup_ratio=0.1)
default_hooks['checkpoint'].update(interval=100)
