from mmengine.optim import OptimWrapper
from torch.optim import AdamW

from projects.llava_sam2_rl.engine.loops import DualLoopTrainLoop
from projects.llava_sam2_rl.engine.schedules import WarmupCosineLR

# `max_iters` or `max_epochs` beside it takes the default's place; the schedule follows.
train_cfg = dict(type=DualLoopTrainLoop, default_length=dict(max_iters=400), val_interval=1000000)
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=5e-4, betas=(0.9, 0.98), weight_decay=0.0),
    clip_grad=dict(max_norm=1.0, error_if_nonfinite=False),
    accumulative_counts=1,
)
param_scheduler = dict(
    type=WarmupCosineLR, by_epoch=False, warmup_ratio=0.05, start_factor=0.1, eta_min_ratio=0.1
)
