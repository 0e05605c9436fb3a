"""mmengine's loops; their data loaders are completed from the rest of the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.runner import IterBasedTrainLoop, ValLoop

from projects.llava_sam2_rl.engine.dataloader_config import runnable_dataloader
from projects.llava_sam2_rl.registry import LOOPS, nearest

_LENGTHS = ('max_iters', 'max_epochs')


@LOOPS.register_module()
class DualLoopTrainLoop(IterBasedTrainLoop):
    """mmengine's ``IterBasedTrainLoop`` whose length is given in iterations or in epochs.

    Its data loader is completed by `runnable_dataloader`: transforms take the model's sizes, data
    sets the options of ``dataset_defaults``.

    Args:
        runner: mmengine's.
        dataloader: A data loader, or its config.
        max_iters: Length of the run in iterations. Defaults to None.
        max_epochs: Length of the run in epochs, also in parts of one. Defaults to None.
        default_length: Length where neither is given: ``dict(max_iters=…)`` or
            ``dict(max_epochs=…)``. Configs set this one, so that either of the two can be given on
            the command line. Defaults to None.
        val_begin: Iteration from which on is validated. Defaults to 1.
        val_interval: Iterations between two validations. Defaults to 1000.
        dynamic_intervals: Intervals of validation from given iterations on, as in mmengine.
            Defaults to None.

    Raises:
        ValueError: No length is given, or two, or one that is not positive.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_iters: int | None = None,
        max_epochs: float | None = None,
        default_length: Mapping[str, float] | None = None,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: list[tuple[int, int]] | None = None,
    ) -> None:
        unit, length = run_length(max_iters, max_epochs, default_length)
        dataloader = runnable_dataloader(dataloader, runner.cfg)
        if unit == 'max_epochs':
            if isinstance(dataloader, dict):
                dataloader = runner.build_dataloader(
                    dataloader,
                    seed=runner.seed,
                    diff_rank_seed=runner._randomness_cfg.get('diff_rank_seed', False),
                )
            length = max(1, int(length * len(dataloader)))
        super().__init__(runner, dataloader, length, val_begin, val_interval, dynamic_intervals)


def run_length(
    max_iters: int | None,
    max_epochs: float | None,
    default_length: Mapping[str, float] | None,
) -> tuple[str, float]:
    """``'max_iters'`` or ``'max_epochs'``, and how many.

    Raises:
        ValueError: As in `DualLoopTrainLoop`.
    """
    both = {'max_iters': max_iters, 'max_epochs': max_epochs}
    given = {unit: length for unit, length in both.items() if length is not None}
    if len(given) > 1:
        raise ValueError(
            f'train_cfg has max_iters={max_iters} and max_epochs={max_epochs}: give one, and set '
            'the other to None'
        )
    given = given or dict(default_length or {})
    if len(given) != 1:
        raise ValueError(
            f'train_cfg has neither max_iters nor max_epochs, and default_length={given}: give one '
            'of them'
        )
    ((unit, length),) = given.items()
    if unit not in _LENGTHS:
        raise ValueError(f'train_cfg.default_length has {unit!r}: {nearest(unit, list(_LENGTHS))}')
    whole = ' and whole' if unit == 'max_iters' else ''
    if length <= 0 or (whole and length != int(length)):
        raise ValueError(f'train_cfg.{unit} must be positive{whole}, got {length}')
    return unit, int(length) if unit == 'max_iters' else length


@LOOPS.register_module()
class DualLoopValLoop(ValLoop):
    """mmengine's ``ValLoop``; its data loader is completed by `runnable_dataloader`.

    Args:
        runner: mmengine's.
        dataloader: A data loader, or its config.
        evaluator: Metrics, or their configs.
        fp16: Validate under autocast. Defaults to False.
    """

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any, fp16: bool = False) -> None:
        super().__init__(runner, runnable_dataloader(dataloader, runner.cfg), evaluator, fp16)
