from projects.llava_sam2_rl.hooks.bad_records import BadRecordHook
from projects.llava_sam2_rl.hooks.checkpoint import AtomicCheckpointHook
from projects.llava_sam2_rl.hooks.cluster_check import ClusterCheckHook
from projects.llava_sam2_rl.hooks.config_check import ConfigCheckHook, RunLogProcessor
from projects.llava_sam2_rl.hooks.deepspeed import DeepSpeedHook
from projects.llava_sam2_rl.hooks.preemption import REQUEUE_EXIT_CODE, PreemptionHook
from projects.llava_sam2_rl.hooks.profile import ProfileHook
from projects.llava_sam2_rl.hooks.rank_seed import RankSeedHook
from projects.llava_sam2_rl.hooks.report import ReportHook
from projects.llava_sam2_rl.hooks.resumed_validation import ResumedValidationHook
from projects.llava_sam2_rl.hooks.reward_failure import RewardFailureHook
from projects.llava_sam2_rl.hooks.rollouts import RolloutHook
from projects.llava_sam2_rl.hooks.teacher import EMATeacherHook
from projects.llava_sam2_rl.hooks.watchdog import WatchdogHook

__all__ = [
    'REQUEUE_EXIT_CODE',
    'AtomicCheckpointHook',
    'BadRecordHook',
    'ClusterCheckHook',
    'ConfigCheckHook',
    'DeepSpeedHook',
    'EMATeacherHook',
    'PreemptionHook',
    'ProfileHook',
    'RankSeedHook',
    'ReportHook',
    'ResumedValidationHook',
    'RewardFailureHook',
    'RolloutHook',
    'RunLogProcessor',
    'WatchdogHook',
]
