from mmengine.hooks import DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
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
    RunLogProcessor,
    WatchdogHook,
)

default_scope = 'llava_sam2_rl'
# Read by mmengine from a dumped config, whose types are strings.
custom_imports = dict(
    imports=['projects.llava_sam2_rl.registry', 'projects.llava_sam2_rl.hooks'],
    allow_failed_imports=False,
)

# Each by its name: --cfg-options default_hooks.rollouts.interval=10. A dump sorts them by name, and
# hooks of one priority run in the order they stand in: each has its own.
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=10, log_metric_by_epoch=False),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=AtomicCheckpointHook, by_epoch=False, interval=500, max_keep_ckpts=3),
    sampler_seed=dict(type=DistSamplerSeedHook),
    config_check=dict(type=ConfigCheckHook, priority=11),
    deepspeed=dict(type=DeepSpeedHook, priority=12),
    cluster_check=dict(type=ClusterCheckHook, priority=13),
    rank_seed=dict(type=RankSeedHook, priority=51),
    teacher=dict(type=EMATeacherHook, priority=52),
    profile=dict(type=ProfileHook, priority=53),
    bad_records=dict(type=BadRecordHook, priority=54, max_bad_fraction=0.2),
    rollouts=dict(type=RolloutHook, priority=55, interval=100),
    reward_failure=dict(type=RewardFailureHook, priority=97),
    resumed_validation=dict(type=ResumedValidationHook, priority=56),
    watchdog=dict(type=WatchdogHook, timeout=1800),
    preemption=dict(type=PreemptionHook, priority=98),
    report=dict(type=ReportHook, priority=99, validate_first=True),
)
# Hooks of your own.
custom_hooks = []

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    # In seconds, of a collective and of the start, where ranks wait for one another. NCCL's own 10
    # minutes would end a run in the midst of what the watchdog allows; this is above its limits.
    dist_cfg=dict(backend='nccl', timeout=3700),
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
    type=RunLogProcessor,
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
