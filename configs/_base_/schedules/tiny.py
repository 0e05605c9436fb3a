from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from mmengine.runner import ValLoop
from torch.optim import AdamW
from xtuner.engine.runner import TrainLoop

train_cfg = dict(type=TrainLoop, max_iters=400, val_interval=1000000)
val_cfg = dict(type=ValLoop)
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=5e-4, betas=(0.9, 0.98), weight_decay=0.0),
    clip_grad=dict(max_norm=1.0, error_if_nonfinite=False),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type=CosineAnnealingLR, eta_min_ratio=0.1, by_epoch=False, begin=20, end=400),
]
