from .bad_records import BadRecordHook
from .checkpoint import AtomicCheckpointHook
from .checkpoint_io import check_checkpoint, check_file, load_from_local, write_atomically
from .config_check import ConfigCheckHook
from .random_state import get_random_state, set_random_state
from .reward_failure import RewardFailureHook
from .rollouts import RolloutHook
from .teacher import EMATeacherHook

__all__ = [
    'AtomicCheckpointHook',
    'BadRecordHook',
    'ConfigCheckHook',
    'EMATeacherHook',
    'RewardFailureHook',
    'RolloutHook',
    'check_checkpoint',
    'check_file',
    'get_random_state',
    'load_from_local',
    'set_random_state',
    'write_atomically',
]
