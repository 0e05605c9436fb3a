"""Sa2VA, the teacher, rollouts and the dual-loop wrapper."""

from projects.llava_sam2_rl.utils.stack import check_versions

# First: a bad mixture of versions fails within the imports below, with an error about other things.
check_versions()

from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.dual_loop import DualLoopModel
from projects.llava_sam2_rl.models.generation import (
    Sampling,
    get_token_logprobs,
    sample_completions,
)
from projects.llava_sam2_rl.models.objectives import (
    GRPOObjective,
    GumbelObjective,
    Objective,
    Rollout,
    SFTObjective,
)
from projects.llava_sam2_rl.models.sa2va.features import ImageFeatures
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.utils.errors import CheckpointError, StackError

__all__ = [
    'CheckpointError',
    'DualLoopModel',
    'EMATeacher',
    'GRPOObjective',
    'GumbelObjective',
    'ImageFeatures',
    'Objective',
    'RegionBatch',
    'Rollout',
    'SFTObjective',
    'Sampling',
    'StackError',
    'VideoLLaVASAMModel',
    'get_token_logprobs',
    'sample_completions',
]
