"""Rewards: callables on a :class:`RolloutBatch` that return one number per rollout."""

from projects.llava_sam2_rl.rewards.base import (
    CompositeReward,
    Direction,
    Reward,
    RewardOutput,
    RewardUnavailableError,
    RolloutBatch,
    needs_of,
    score,
)
from projects.llava_sam2_rl.rewards.caption_likelihood import CaptionLikelihoodReward
from projects.llava_sam2_rl.rewards.length import LengthReward
from projects.llava_sam2_rl.rewards.llm_judge import LLMJudgeReward
from projects.llava_sam2_rl.rewards.mask_confidence import MaskConfidenceReward
from projects.llava_sam2_rl.rewards.mask_iou import (
    MaskIoUReward,
    iou_matrix,
    mask_iou,
    matched_iou,
    track_ious,
)
from projects.llava_sam2_rl.rewards.meteor import MeteorReward, meteor
from projects.llava_sam2_rl.rewards.permuted import PermutedReward
from projects.llava_sam2_rl.rewards.weighted import WeightedRewards

__all__ = [
    'CaptionLikelihoodReward',
    'CompositeReward',
    'Direction',
    'LLMJudgeReward',
    'LengthReward',
    'MaskConfidenceReward',
    'MaskIoUReward',
    'MeteorReward',
    'PermutedReward',
    'Reward',
    'RewardOutput',
    'RewardUnavailableError',
    'RolloutBatch',
    'WeightedRewards',
    'iou_matrix',
    'mask_iou',
    'matched_iou',
    'meteor',
    'needs_of',
    'score',
    'track_ious',
]
