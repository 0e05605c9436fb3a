"""Rewards: callables on a :class:`RolloutBatch` that return one number per rollout."""

from projects.llava_sam2_rl.rewards.base import (
    CompositeReward,
    Direction,
    Reward,
    RewardOutput,
    RewardUnavailableError,
    RolloutBatch,
    can_start,
    needs_of,
    score,
    scores_of,
    start,
)
from projects.llava_sam2_rl.rewards.caption_likelihood import CaptionLikelihoodReward
from projects.llava_sam2_rl.rewards.length import LengthReward
from projects.llava_sam2_rl.rewards.llm_judge import LLMJudgeReward
from projects.llava_sam2_rl.rewards.mask_confidence import MaskConfidenceReward
from projects.llava_sam2_rl.rewards.mask_iou import (
    MaskIoUReward,
    clip_iou,
    iou_matrix,
    mask_iou,
    matched_iou,
    track_ious,
)
from projects.llava_sam2_rl.rewards.meteor import MeteorReward, meteor
from projects.llava_sam2_rl.rewards.pending import PendingScores
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
    'PendingScores',
    'PermutedReward',
    'Reward',
    'RewardOutput',
    'RewardUnavailableError',
    'RolloutBatch',
    'WeightedRewards',
    'can_start',
    'clip_iou',
    'iou_matrix',
    'mask_iou',
    'matched_iou',
    'meteor',
    'needs_of',
    'score',
    'scores_of',
    'start',
    'track_ious',
]
