from mmengine.optim import AmpOptimWrapper
from torch.optim import AdamW

from projects.llava_sam2_rl.engine.loops import DualLoopTrainLoop
from projects.llava_sam2_rl.engine.schedules import WarmupCosineLR

# `max_iters` or `max_epochs` beside it takes the default's place; the schedule follows.
train_cfg = dict(type=DualLoopTrainLoop, default_length=dict(max_epochs=2), val_interval=500)
optim_wrapper = dict(
    type=AmpOptimWrapper,
    dtype='bfloat16',
    # bfloat16 has float32's range: nothing to scale, and no wait for each step's infinities.
    loss_scale=dict(enabled=False),
    optimizer=dict(type=AdamW, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=1.0, error_if_nonfinite=False),
    accumulative_counts=4,
)
param_scheduler = dict(
    type=WarmupCosineLR, by_epoch=False, warmup_ratio=0.05, start_factor=1e-5, eta_min_ratio=0.0
)
