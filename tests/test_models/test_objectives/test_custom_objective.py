"""A new objective needs no line of the package: here REINFORCE on the IoU of the return trip."""

from __future__ import annotations

import copy

import torch
from mmengine.optim import OptimWrapper

from projects.llava_sam2_rl.models import DualLoopModel, Objective, Rollout, Sampling
from projects.llava_sam2_rl.models.captioning import caption_loss, sample_captions
from projects.llava_sam2_rl.models.segmentation import masks_at_size, segment_descriptions
from projects.llava_sam2_rl.models.shared_prefix import SharedPrefixForward
from projects.llava_sam2_rl.registry import OBJECTIVES
from projects.llava_sam2_rl.rewards import MaskIoUReward, RolloutBatch, score
from projects.llava_sam2_rl.structures import MeanLoss


@OBJECTIVES.register_module(force=True)
class ReinforceForTest(Objective):
    """Captions whose masks fit better than the batch's mean become likelier."""

    has_rewards = True
    num_iterations = 2

    def __init__(self, caption_weight: float = 1.0):
        super().__init__()
        self.caption_weight = caption_weight

    def rollout(self, policy, teacher, batch):
        drawn = sample_captions(policy, batch, 1, Sampling(max_new_tokens=self.max_new_tokens))
        with teacher.applied_to(policy):
            images = batch.target_image
            low_res, _ = segment_descriptions(policy, batch, drawn.texts, images, batch.names)
        inputs = RolloutBatch(
            completions=drawn.texts,
            num_generations=1,
            direction='mask_to_caption',
            gt_masks=[mask[None] for mask in batch.target_masks],
            pred_mask_logits=masks_at_size(low_res, batch.target_masks),
        )
        rewards = score(MaskIoUReward(), inputs)
        self.last_rollouts = {
            'mask_to_caption': Rollout(
                samples=range(len(batch)),
                captions=drawn.texts,
                completions=drawn,
                reward_inputs=inputs,
                rewards=rewards,
                advantages=rewards.rewards - rewards.rewards.mean(),
            )
        }
        return self.last_rollouts

    def losses(self, policy, batch, rollouts):
        rollout = rollouts['mask_to_caption']
        shared = SharedPrefixForward(policy, batch)
        asked = shared.add_captions(rollout.completions)
        shared.forward()
        logps, _ = shared.per_token_logps(asked, 1.0)
        loss = -(logps.sum(1) * rollout.advantages).mean()
        supervised = caption_loss(policy, batch, batch.captioned)
        return {
            'loop1/reinforce_loss': MeanLoss(loss, len(batch)),
            'loop1/caption_loss': supervised.weighted(self.caption_weight),
        }, {'loop1/reward_mean': rollout.rewards.rewards.mean()}


def test_it_trains(tiny_model, batch):
    torch.manual_seed(0)
    objective = dict(type='ReinforceForTest', caption_weight=2.0)
    model = DualLoopModel(tiny_model.policy, objective, adaptive_weights={}, max_new_tokens=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapper = OptimWrapper(torch.optim.AdamW(trained, lr=1e-3))
    logs = [model.train_step(copy.deepcopy(batch), wrapper) for _ in range(4)]
    assert logs[-1]['loop1/caption_loss'] < 0.7 * logs[0]['loop1/caption_loss']
    assert 0 < model.objective.last_rollouts['mask_to_caption'].rewards.rewards.max() <= 1
    assert {key.split('/')[0] for key in logs[0]} == {'loss', 'loop1'}
