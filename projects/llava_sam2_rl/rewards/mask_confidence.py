"""How sure the predicted mask is of itself: a smooth companion of the IoU."""

from __future__ import annotations

from torch import Tensor

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards.base import RolloutBatch


@REWARDS.register_module()
class MaskConfidenceReward:
    """Mean of ``2 * sigmoid(logit) - 1`` over the predicted inside (logit > 0), mean over regions.

    0 for a mask that is empty or hovers at the threshold, 1 for one that is certain. It shapes the
    reward where the IoU of all rollouts is equal, above all at 0; it looks at no true mask and so
    says nothing about being right: give it a small weight beside ``MaskIoUReward``.
    """

    name = 'mask_confidence'
    needs = ()

    def __call__(self, rollouts: RolloutBatch) -> list[float | None]:
        """A number in [0, 1] per rollout.

        Raises:
            ValueError: The batch holds no predicted masks.
        """
        if rollouts.pred_mask_logits is None:
            raise ValueError('MaskConfidenceReward needs pred_mask_logits, the batch has none')
        return [_confidence(logits) for logits in rollouts.pred_mask_logits]


def _confidence(logits: Tensor) -> float:
    logits = logits.detach().float()
    inside = logits > 0
    certainty = ((2 * logits.sigmoid() - 1) * inside).nan_to_num(0.0)
    per_region = certainty.sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
    return float(per_region.mean().clamp(0, 1)) if len(per_region) else 0.0
