from mmengine.hooks import DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.runner import LogProcessor
from mmengine.visualization import LocalVisBackend, TensorboardVisBackend, Visualizer

from projects.llava_sam2_rl.hooks import (
    AtomicCheckpointHook,
    BadRecordHook,
    ClusterCheckHook,
    ConfigCheckHook,
    DeepSpeedHook,
    EMATeacherHook,
    PreemptionHook,
    ProfileHook,
    RankSeedHook,
    ReportHook,
    ResumedValidationHook,
    RewardFailureHook,
    RolloutHook,
    WatchdogHook,
)

default_scope = 'llava_sam2_rl'
# Read by mmengine from a dumped config, whose types are strings.
custom_imports = dict(
    imports=['projects.llava_sam2_rl.registry', 'projects.llava_sam2_rl.hooks'],
    allow_failed_imports=False,
)

default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=10, log_metric_by_epoch=False),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=AtomicCheckpointHook, by_epoch=False, interval=500, max_keep_ckpts=3),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
custom_hooks = [
    dict(type=ConfigCheckHook),
    dict(type=DeepSpeedHook),
    dict(type=ClusterCheckHook),
    dict(type=RankSeedHook),
    dict(type=EMATeacherHook),
    dict(type=ProfileHook),
    dict(type=BadRecordHook, max_bad_fraction=0.2),
    dict(type=RolloutHook, interval=100),
    dict(type=RewardFailureHook),
    dict(type=ResumedValidationHook),
    dict(type=WatchdogHook, timeout=1800),
    dict(type=PreemptionHook),
    dict(type=ReportHook, validate_first=True),
]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
# Under a launcher and without DeepSpeed; the name is looked up once the model is built.
model_wrapper_cfg = dict(
    type='DualLoopDistributed', broadcast_buffers=False, gradient_as_bucket_view=True
)
visualizer = dict(
    type=Visualizer,
    vis_backends=[dict(type=LocalVisBackend), dict(type=TensorboardVisBackend)],
)
log_processor = dict(
    type=LogProcessor,
    by_epoch=False,
    window_size=10,
    # The same numbers under the names that other GRPO trainers log.
    custom_cfg=[
        dict(data_src='time', log_name='step_time', method_name='mean', window_size=10),
        dict(data_src='lr', log_name='learning_rate', method_name='mean', window_size=1),
    ],
)
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=0, deterministic=False)
