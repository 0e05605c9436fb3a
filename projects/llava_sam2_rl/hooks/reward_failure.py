"""A reward that is down stops the run: checkpoint first, on all ranks, with the reason."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook

from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.hooks.checkpoint import AtomicCheckpointHook
from projects.llava_sam2_rl.registry import HOOKS


@HOOKS.register_module()
class RewardFailureHook(Hook):
    """Saves and stops when a reward gave up (a judge after ``max_consecutive_failures``).

    The step in which that happens goes on with its completions unscored, so they teach nothing;
    after it all ranks agree to stop, the checkpoint of that step is written by the run's
    `AtomicCheckpointHook`, and every rank raises. A reward that raised in the middle of a step
    would leave the other ranks waiting, and nothing could be saved. Objectives without rewards
    are left alone.

    Raises:
        RuntimeError: A reward gave up. The message names the reason and the checkpoint.
    """

    # After the logger, the schedulers and a checkpoint that is due at this step anyway.
    priority = 'LOWEST'

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Looks whether a reward of any rank gave up in this step."""
        objective = unwrapped(runner).objective
        if not objective.has_rewards:
            return
        rollouts = objective.last_rollouts.values()
        reasons = [r.rewards.failure for r in rollouts if r.rewards.failure]
        failed = torch.tensor(float(bool(reasons)))
        all_reduce(failed, op='max')
        if not failed:
            return
        by_rank = [' and '.join(found) for found in all_gather_object(reasons)]
        reason = '; '.join(sorted({text for text in by_rank if text}))
        saver = next((h for h in runner.hooks if isinstance(h, AtomicCheckpointHook)), None)
        if saver is None:
            saved = 'No checkpoint was written: the run has no AtomicCheckpointHook'
        else:
            saved = f'Go on with `--resume {saver.save_now(runner)}`'
        message = f'The run stops after iteration {runner.iter + 1}: {reason}. {saved}'
        runner.logger.error(message)
        raise RuntimeError(message)
