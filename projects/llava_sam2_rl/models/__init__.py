"""Sa2VA, the teacher, rollouts and the dual-loop wrapper."""

from .checkpoint import CheckpointError
from .dual_loop import DualLoopModel, LoopBatch
from .objectives import SFTObjective
from .teacher import EMATeacher
from .video_llava_sam import ImageFeatures, VideoLLaVASAMModel

__all__ = [
    'CheckpointError',
    'DualLoopModel',
    'EMATeacher',
    'ImageFeatures',
    'LoopBatch',
    'SFTObjective',
    'VideoLLaVASAMModel',
]
