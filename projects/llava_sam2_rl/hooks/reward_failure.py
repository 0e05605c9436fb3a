"""A reward that is down stops the run: checkpoint first, on all ranks, with the reason."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook

from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.hooks.checkpoint import AtomicCheckpointHook
from projects.llava_sam2_rl.registry import HOOKS


@HOOKS.register_module()
class RewardFailureHook(Hook):
    """Saves and stops when a reward gave up, or declines too often.

    A reward gives up by `RewardUnavailableError` (a judge after ``max_consecutive_failures``). It
    declines too often when one of its parts scored fewer than ``1 - max_declined`` of the
    completions with a reference caption in the last ``window`` steps that sampled any: the run
    then trains on the other parts alone, or on nothing. Completions without a reference are not
    counted, since METEOR and judges decline those by design.

    The step in which that happens goes on with its completions unscored, so they teach nothing;
    after it all ranks agree to stop, the checkpoint of that step is written by the run's
    `AtomicCheckpointHook`, and every rank raises. A reward that raised in the middle of a step
    would leave the other ranks waiting, and nothing could be saved. Objectives without rewards
    are left alone.

    Args:
        max_declined: Largest share of completions that a part may decline, in (0, 1]; 1 never
            stops the run. Defaults to 0.5.
        window: Steps over which the share is taken, per rank. Defaults to 50.

    Raises:
        RuntimeError: A reward gave up or declined too often. The message names the reason and the
            checkpoint.
        ValueError: An option is out of range.
    """

    # After the logger, the schedulers and a checkpoint that is due at this step anyway.
    priority = 'LOWEST'

    def __init__(self, max_declined: float = 0.5, window: int = 50) -> None:
        if not 0 < max_declined <= 1 or window < 1:
            raise ValueError(
                f'max_declined must lie in (0, 1] and window be at least 1, got {max_declined} and '
                f'{window}'
            )
        self.max_declined = max_declined
        self.window = window
        #: ``(declined, asked)`` of the last steps, by direction and part.
        self._counts: dict[str, deque[tuple[int, int]]] = defaultdict(lambda: deque(maxlen=window))

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Looks whether a reward of any rank gave up in this step."""
        objective = unwrapped(runner).objective
        if not objective.has_rewards:
            return
        rollouts = objective.last_rollouts
        reasons = [r.rewards.failure for r in rollouts.values() if r.rewards.failure]
        reasons += self._declines(rollouts.items())
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

    def _declines(self, rollouts: Iterable[tuple[str, Any]]) -> list[str]:
        """Counts what each part declined in this step; reasons to stop."""
        reasons = []
        for direction, rollout in rollouts:
            references = rollout.reward_inputs.references
            parts = rollout.rewards.rewards_per_func
            if references is not None:
                parts = parts[torch.tensor([bool(text and text.strip()) for text in references])]
            if not len(parts):
                continue
            for name, column in zip(rollout.rewards.names, parts.unbind(1), strict=True):
                counts = self._counts[f'{name} ({direction})']
                counts.append((int(column.isnan().sum()), len(column)))
                declined, asked = (sum(column) for column in zip(*counts, strict=True))
                if len(counts) == self.window and declined > self.max_declined * asked:
                    reasons.append(
                        f'reward {name} ({direction}) could not score {declined} of {asked} '
                        f'completions in {self.window} steps, more than max_declined='
                        f'{self.max_declined}: mend it, or set '
                        'default_hooks.reward_failure.max_declined=1 where that is meant'
                    )
        return reasons
