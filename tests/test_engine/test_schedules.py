"""Learning rates by hand-written formulas, and what a resumed run does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, LinearLR

from projects.llava_sam2_rl.engine.schedules import WarmupCosineLR
from projects.llava_sam2_rl.registry import PARAM_SCHEDULERS

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    ('sa2va_tiny_dual_loop', 200, 1e-4),
    ('sa2va_tiny_dual_loop_gumbel', 200, 1e-4),
    ('sa2va_tiny_dual_loop_sft', 400, 5e-4),
]


def optimizer_of(lr):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(optimizer, schedulers, steps):
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return seen


def two_schedulers(optimizer, end, warmup=20, start=0.1, ratio=0.1):
    """What the configs had: mmengine's two, one after the other."""
    return [
        LinearLR(optimizer, start_factor=start, by_epoch=False, begin=0, end=warmup),
        CosineAnnealingLR(optimizer, eta_min_ratio=ratio, by_epoch=False, begin=warmup, end=end),
    ]


def by_hand(lr, end, warmup=20, start=0.1, ratio=0.1):
    low = lr * ratio
    for step in range(end):
        if step < warmup:
            yield lr * (start + (1 - start) * step / (warmup - 1))
        else:
            share = (step - warmup) / (end - warmup)
            yield low + (lr - low) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(('name', 'end', 'lr'), TINY)
def test_the_tiny_configs_keep_their_rates_to_the_bit(name, end, lr):
    config = Config.fromfile(ROOT / f'configs/{name}.py')
    assert config.train_cfg.default_length == {'max_iters': end}
    assert config.optim_wrapper.optimizer.lr == lr
    optimizer = optimizer_of(lr)
    # `end` as mmengine's runner gives it.
    made = PARAM_SCHEDULERS.build(
        dict(config.param_scheduler, end=end),
        default_args={'optimizer': optimizer, 'epoch_length': 3000},
    )
    ours = rates(optimizer, [made], end)
    before = optimizer_of(lr)
    assert ours == rates(before, two_schedulers(before, end), end)
    assert ours == pytest.approx(list(by_hand(lr, end)), rel=1e-12)


@pytest.mark.parametrize(
    ('end', 'warmup'), [(1, 0), (3, 0), (10, 0), (40, 2), (90, 4), (2000, 100)]
)
def test_the_schedule_follows_the_runs_length(end, warmup):
    optimizer = optimizer_of(1.0)
    made = WarmupCosineLR(optimizer, end, by_epoch=False, eta_min_ratio=0.1)
    assert made.warmup_iters == warmup
    seen = rates(optimizer, [made], end)
    assert max(seen) == pytest.approx(1.0)
    if warmup:
        assert seen[0] == pytest.approx(0.1)
        assert seen == pytest.approx(list(by_hand(1.0, end, warmup)))
    # Past its end a rate stays.
    assert len(set(rates(optimizer, [made], 3))) == 1


@pytest.mark.parametrize('at', [0, 7, 19, 20, 21, 150])
def test_a_resumed_run_goes_on_to_the_bit(at):
    optimizer = optimizer_of(1e-4)
    options = dict(warmup_ratio=0.1, by_epoch=False, eta_min_ratio=0.1)
    whole = rates(optimizer, [WarmupCosineLR(optimizer, 200, **options)], 200)
    first = optimizer_of(1e-4)
    made = WarmupCosineLR(first, 200, **options)
    rates(first, [made], at)
    second = optimizer_of(1e-4)
    resumed = WarmupCosineLR(second, 200, **options)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(made.state_dict())
    assert rates(second, [resumed], 200 - at) == whole[at:]


@pytest.mark.parametrize('at', [7, 20, 150])
def test_a_checkpoint_with_two_schedulers_goes_on_to_the_bit(at):
    """mmengine gives the states of a list to the schedulers one by one: the warm-up's comes."""
    before = optimizer_of(1e-4)
    two = two_schedulers(before, 200)
    whole = rates(before, two, 200)
    first = optimizer_of(1e-4)
    two = two_schedulers(first, 200)
    rates(first, two, at)
    second = optimizer_of(1e-4)
    resumed = WarmupCosineLR(
        second, 200, warmup_ratio=0.1, start_factor=0.1, eta_min_ratio=0.1, by_epoch=False
    )
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(two[0].state_dict())
    assert rates(second, [resumed], 200 - at) == whole[at:]


@pytest.mark.parametrize('at', [5, 15, 100])
def test_a_run_made_longer_has_the_rates_of_the_longer_run(at):
    first = optimizer_of(1.0)
    options = dict(warmup_ratio=0.1, by_epoch=False, eta_min_ratio=0.1)
    made = WarmupCosineLR(first, 100, **options)
    rates(first, [made], at)
    second = optimizer_of(1.0)
    longer = WarmupCosineLR(second, 300, **options)
    second.load_state_dict(first.state_dict())
    longer.load_state_dict(made.state_dict())
    seen = rates(second, [longer], 300 - at)
    assert seen == pytest.approx(list(by_hand(1.0, 300, 30))[at:])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(), 'give by_epoch=False'),
        (dict(by_epoch=False, warmup_ratio=20), r'warmup_ratio must be within \[0, 1\], got 20'),
        (dict(by_epoch=False, eta_min_ratio=-1), 'eta_min_ratio'),
    ],
)
def test_options_without_a_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupCosineLR(optimizer_of(1.0), 100, **options)
