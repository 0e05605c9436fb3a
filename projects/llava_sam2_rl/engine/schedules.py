"""Learning rates that follow the run's length."""

from __future__ import annotations

import math
from typing import Any

from mmengine.optim import CosineAnnealingParamScheduler, LinearParamScheduler
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler

from projects.llava_sam2_rl.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(LRSchedulerMixin, _ParamScheduler):
    """Linear warm-up, then a cosine down to the end of the run; by mmengine's own formulas.

    mmengine's runner fills in ``end``, the run's iterations, whichever way its length was given.

    Args:
        optimizer: The optimizer, or its wrapper.
        end: Iteration at which the cosine ends. Defaults to the run's last.
        warmup_ratio: Share of ``end`` that warms up. Defaults to 0.05.
        start_factor: Share of the learning rate that the warm-up starts from. Defaults to 0.1.
        eta_min_ratio: Share of the learning rate that the cosine ends at. Defaults to 0.0.
        by_epoch: Must be ``False``: iterations are counted.
        last_step: As in mmengine. Defaults to -1.
        verbose: Print every change. Defaults to False.

    A run that goes on from a checkpoint and is made longer or shorter goes on at the rate that a
    run of its new length has there.

    Raises:
        ValueError: A share is not within [0, 1], or ``by_epoch`` is not ``False``.
    """

    last_step: int

    def __init__(
        self,
        optimizer: Any,
        end: int,
        warmup_ratio: float = 0.05,
        start_factor: float = 0.1,
        eta_min_ratio: float = 0.0,
        by_epoch: bool = True,
        last_step: int = -1,
        verbose: bool = False,
    ) -> None:
        shares = dict(
            warmup_ratio=warmup_ratio, start_factor=start_factor, eta_min_ratio=eta_min_ratio
        )
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f'{name} must be within [0, 1], got {share}')
        if by_epoch:
            raise ValueError('WarmupCosineLR counts iterations: give by_epoch=False')
        self.warmup_iters = round(warmup_ratio * end)
        # The line has reached the full rate at its last point: one point is none.
        if self.warmup_iters < 2:
            self.warmup_iters = 0
        self.start_factor, self.end_factor = start_factor, 1.0
        self.total_iters = self.warmup_iters - 1
        self.eta_min, self.eta_min_ratio = None, eta_min_ratio
        self.T_max = max(1, end - self.warmup_iters)
        super().__init__(
            optimizer, end=end, last_step=last_step, by_epoch=by_epoch, verbose=verbose
        )

    def _get_value(self) -> list[float]:
        if self.last_step < self.warmup_iters:
            return LinearParamScheduler._get_value(self)
        step, self.last_step = self.last_step, self.last_step - self.warmup_iters
        try:
            return CosineAnnealingParamScheduler._get_value(self)
        finally:
            self.last_step = step

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on from a saved state, of this class or of the warm-up that it replaced.

        Where the run is now of another length, the rate is that of the new schedule. Checkpoints of
        earlier versions hold a ``LinearLR`` and a ``CosineAnnealingLR``; mmengine hands in the
        first of them, which knows its own end alone.
        """
        self.base_values = state_dict['base_values']
        self._global_step = state_dict['_global_step']
        self.last_step = min(self._global_step, self.end - 1)
        if 'warmup_iters' not in state_dict:
            self.warmup_iters = state_dict['end']
            self.total_iters = state_dict['total_iters']
            self.start_factor = state_dict['start_factor']
            self.T_max = max(1, self.end - self.warmup_iters)
        elif state_dict['end'] != self.end:
            for base, group in zip(self.base_values, self.optimizer.param_groups, strict=True):
                group[self.param_name] = self._rate(base)
        self._last_value = [group[self.param_name] for group in self.optimizer.param_groups]

    def _rate(self, base: float) -> float:
        """The rate at ``last_step`` by itself, where mmengine's formulas change the one before."""
        if self.last_step < self.warmup_iters:
            share = self.last_step / self.total_iters
            return base * (self.start_factor + (1 - self.start_factor) * share)
        share = (self.last_step - self.warmup_iters) / self.T_max
        low = base * self.eta_min_ratio
        return low + (base - low) * (1 + math.cos(math.pi * share)) / 2
