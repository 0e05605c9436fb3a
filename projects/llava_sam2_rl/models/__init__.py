"""Sa2VA, the teacher, rollouts and the dual-loop wrapper."""

from .checkpoint import CheckpointError
from .dual_loop import DualLoopModel, LoopBatch
from .objectives import GRPOObjective, GumbelObjective, SFTObjective
from .rollout import Sampling, get_token_logprobs, sample_completions
from .teacher import EMATeacher
from .video_llava_sam import ImageFeatures, VideoLLaVASAMModel

__all__ = [
    'CheckpointError',
    'DualLoopModel',
    'EMATeacher',
    'GRPOObjective',
    'GumbelObjective',
    'ImageFeatures',
    'LoopBatch',
    'SFTObjective',
    'Sampling',
    'VideoLLaVASAMModel',
    'get_token_logprobs',
    'sample_completions',
]
