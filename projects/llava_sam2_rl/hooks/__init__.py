from .bad_records import BadRecordHook
from .checkpoint import AtomicCheckpointHook
from .checkpoint_io import check_checkpoint, check_file, load_from_local, write_atomically
from .cluster_check import ClusterCheckHook
from .config_check import ConfigCheckHook
from .deepspeed import DeepSpeedHook
from .preemption import REQUEUE_EXIT_CODE, PreemptionHook
from .profile import ProfileHook
from .random_state import RankSeedHook, get_random_state, set_random_state
from .report import ReportHook
from .resumed_validation import ResumedValidationHook
from .reward_failure import RewardFailureHook
from .rollouts import RolloutHook
from .teacher import EMATeacherHook
from .watchdog import WatchdogHook

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
    'WatchdogHook',
    'check_checkpoint',
    'check_file',
    'get_random_state',
    'load_from_local',
    'set_random_state',
    'write_atomically',
]
