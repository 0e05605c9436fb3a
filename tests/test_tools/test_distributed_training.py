"""The tiny configs on two ranks by ``tools/train.py``: DDP and ZeRO, stopped and resumed."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import PATIENCE, run_ranks, trainings
from runs import load, training

OBJECTIVES = {'grpo': '', 'gumbel': '_gumbel', 'sft': '_sft'}
MODES = {
    'ddp': None,
    'zero1': 'zero1_fp32.json',
    'zero2': 'zero2_fp32.json',
    'zero3': 'zero3_fp32.json',  # of this model all weights are small enough to stay whole
    'zero3_parts': '../../tests/data/zero3_parts_fp32.json',
    'zero3_parts_bf16': '../../tests/data/zero3_parts.json',
    'zero2_bf16': 'zero2.json',
    'zero3_bf16': 'zero3.json',
}
SMALL = [
    'train_cfg.max_iters=1',
    'train_dataloader.batch_size=1',
    'default_hooks.checkpoint.interval=1',
    'default_hooks.checkpoint.max_keep_ckpts=9',
    'default_hooks.logger.interval=1',
    'val_dataloader.dataset.length=2',
    'model.max_new_tokens=8',
    'optim_wrapper.optimizer.lr=1e-3',
]
LOSSES = ('loss', 'loop1/loss', 'loop2/loss')


def arguments(root: Path, folder: Path, objective: str, mode: str, *more: str) -> list[str]:
    """Of a run in the folder ``<objective>_<mode>``; ``more`` are options of the config."""
    config = root / f'configs/sa2va_tiny_dual_loop{OBJECTIVES[objective]}.py'
    found = [str(config), '--launcher', 'pytorch', '--work-dir', str(folder)]
    if MODES[mode]:
        found += ['--deepspeed', str(root / 'configs/deepspeed' / MODES[mode])]
    group = ['model.objective.num_generations=2'] if objective == 'grpo' else []
    return [*found, '--cfg-options', *SMALL, *group, *more]


def resumed(command: list[str], checkpoint: Path | str) -> list[str]:
    return [command[0], '--resume', str(checkpoint), *command[1:]]


HALF = 'optim_wrapper.accumulative_counts=2'
#: Runs that are resumed in their middle: name, objective, mode, iterations, options.
RESUMED = [
    ('grpo_zero2', 'grpo', 'zero2', 4, []),
    ('sft_zero1', 'sft', 'zero1', 2, []),
    ('sft_zero3_parts_bf16', 'sft', 'zero3_parts_bf16', 2, []),
    ('gumbel_zero3_bf16', 'gumbel', 'zero3_bf16', 2, []),
    ('grpo_zero2_bf16', 'grpo', 'zero2_bf16', 4, [HALF]),
]
#: One iteration only.
SHORT = [
    (f'{objective}_{mode}', objective, mode)
    for objective in OBJECTIVES
    for mode in ('ddp', 'zero1', 'zero2', 'zero3')
    if f'{objective}_{mode}' not in ('grpo_zero2', 'sft_zero1')
]
#: No reward reads captions. Of the two steps the second is drawn: both ranks write them there.
#: Each rank samples groups without variance again as it needs to.
LIKELIHOOD = [
    'model.objective.caption_to_mask.reward.type='
    'projects.llava_sam2_rl.rewards.CaptionLikelihoodReward',
    'model.objective.num_iterations=2',
    'model.objective.max_refills=1',
    'train_cfg.max_iters=2',
    'default_hooks.rollouts.interval=2',
]
#: One iteration from the checkpoint of another mode: mode, checkpoint.
CROSSED = {
    'ddp': 'grpo_zero2/iter_2.pth',
    'zero3': 'grpo_zero2/iter_2.pth',
    'zero3_parts': 'grpo_zero2/iter_2.pth',
    'zero2': 'grpo_ddp/iter_1.pth',
}


@pytest.fixture(scope='module')
def runs(root, tmp_path_factory) -> Path:
    """All of them, in one pair of processes."""
    folder = tmp_path_factory.mktemp('runs')
    # The others begin with its weights: under DeepSpeed the first LoRA matrices are drawn later.
    jobs = [arguments(root, folder / 'start', 'sft', 'ddp')]
    start = f'load_from={folder / "start" / "iter_1.pth"}'
    for name, objective, mode in SHORT:
        jobs.append(arguments(root, folder / name, objective, mode, start))
    for name, objective, mode, iterations, more in RESUMED:
        options = [f'train_cfg.max_iters={iterations}', *more]
        jobs.append(arguments(root, folder / name, objective, mode, start, *options))
        again = arguments(root, folder / f'{name}_resumed', objective, mode, *options)
        jobs.append(resumed(again, folder / name / f'iter_{iterations // 2}.pth'))
    for mode in ('ddp', 'zero3'):
        folder_of_it = folder / f'likelihood_{mode}'
        jobs.append(arguments(root, folder_of_it, 'grpo', mode, start, *LIKELIHOOD))
    for mode, checkpoint in CROSSED.items():
        last = int(checkpoint[-5]) + 1
        options = [f'train_cfg.max_iters={last}']
        command = arguments(root, folder / f'crossed_{mode}', 'grpo', mode, *options)
        jobs.append(resumed(command, folder / checkpoint))
    run_ranks(trainings, 2, folder / 'logs', root, jobs, timeout=3 * PATIENCE)
    return folder


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize('objective', list(OBJECTIVES))
def test_ddp_and_every_zero_stage_train_alike(runs, objective):
    (expected,) = training(runs / f'{objective}_ddp').values()
    wanted = load(runs / f'{objective}_ddp' / 'iter_1.pth')
    assert any(abs(expected[key]) > 1e-3 for key in LOSSES)
    start = load(runs / 'start' / 'iter_1.pth')
    assert difference(wanted['state_dict'], start['state_dict']) > 1e-5
    for stage in (1, 2, 3):
        folder = runs / f'{objective}_zero{stage}'
        row = training(folder)[1]
        for key in LOSSES:
            assert row[key] == pytest.approx(expected[key], abs=1e-4), (stage, key)
        found = load(folder / 'iter_1.pth')
        # The first gradients; AdamW's first step is their sign times the learning rate.
        order = sorted(wanted['optimizer']['state'])
        for name, i in zip(found['state_dict'], order, strict=True):
            a = found['named_optimizer']['state'][name]['exp_avg']
            b = wanted['optimizer']['state'][i]['exp_avg']
            assert float((a - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max())), name
        # `start` had one update.
        assert found['teacher']['num_updates'] == wanted['teacher']['num_updates'] == 2
        assert difference(found['teacher']['shadows'], wanted['teacher']['shadows']) < 1e-5


def same(a, b, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            same(*pair, f'{where}/{i}')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'iterations', 'more'), [(r[0], *r[3:]) for r in RESUMED])
def test_the_second_half_of_a_run_is_repeated_bit_for_bit(runs, name, iterations, more):
    again = runs / f'{name}_resumed'
    rows = training(again)
    assert sorted(rows) == list(range(iterations // 2 + 1, iterations + 1))
    for step, row in rows.items():
        for key in LOSSES:
            assert row[key] == training(runs / name)[step][key], (step, key)
    last = f'iter_{iterations}.pth'
    first, second = (load(folder / last) for folder in (runs / name, again))
    for part in ('state_dict', 'teacher', 'named_optimizer', 'random_states', 'param_schedulers'):
        same(first[part], second[part], part)
    steps = iterations // (2 if more else 1)
    assert first['teacher']['num_updates'] == 1 + steps  # `start` had one
    states = first['named_optimizer']['state']
    assert states.keys() == first['state_dict'].keys()
    assert all(state['step'] == steps for state in states.values())
    assert all(value.dtype == torch.float32 for value in first['state_dict'].values())
    assert Path((again / 'last_checkpoint').read_text()) == again / last


@pytest.mark.slow
@pytest.mark.parametrize('mode', list(CROSSED))
def test_a_run_goes_on_under_another_launcher_or_stage(runs, mode):
    """Each is a run of GRPO in float32, so the next step is that of ``grpo_zero2``."""
    expected, rows = training(runs / 'grpo_zero2'), training(runs / f'crossed_{mode}')
    ((step, row),) = rows.items()
    assert step == int(CROSSED[mode][-5]) + 1
    for key in LOSSES:
        assert row[key] == pytest.approx(expected[step][key], abs=1e-4), key
    if mode == 'zero3_parts':
        assert 'gather_for_rollout=True' in (runs / 'logs' / 'rank0.log').read_text()
    last = f'iter_{step}.pth'
    wanted, found = (load(runs / name / last) for name in ('grpo_zero2', f'crossed_{mode}'))
    assert found['teacher']['num_updates'] == wanted['teacher']['num_updates'] == 1 + step
    assert difference(found['teacher']['shadows'], wanted['teacher']['shadows']) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['ddp', 'zero3'])
def test_captions_that_no_reward_reads_are_written_in_steps_that_are_drawn(runs, mode):
    folder = runs / f'likelihood_{mode}'
    assert len(training(folder)) >= 2
    rows = (folder / 'rollouts/iter_00000002.jsonl').read_text(encoding='utf-8').splitlines()
    found = [json.loads(row) for row in rows]
    assert not (folder / 'rollouts/iter_00000001.jsonl').exists()
    second = [row for row in found if row['direction'] == 'caption_to_mask']
    assert second
    assert all(isinstance(row['completion'], str) for row in second)
    assert all(set(row['rewards']) == {'caption_likelihood'} for row in second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('checkpoint', 'mode'),
    [
        ('grpo_zero2/iter_2.pth', 'zero1'),
        ('grpo_zero2/iter_2.pth', 'zero3_parts'),
        ('crossed_zero3_parts/iter_3.pth', 'zero1'),
    ],
)
def test_another_number_of_ranks_goes_on_from_that_state_and_says_so(
    runs, root, tmp_path, checkpoint, mode
):
    before, steps = load(runs / checkpoint), int(checkpoint[-5]) + 1
    command = arguments(root, tmp_path / 'one_rank', 'grpo', mode, f'train_cfg.max_iters={steps}')
    job = resumed(command, runs / checkpoint)
    run_ranks(trainings, 1, tmp_path / 'logs', root, [job])
    text = (tmp_path / 'logs' / 'rank0.log').read_text()
    assert 'holds random states of 2 ranks and this run has 1' in text
    after = load(tmp_path / 'one_rank' / f'iter_{steps}.pth')
    assert after['teacher']['num_updates'] == before['teacher']['num_updates'] + 1
    decay = 0.999
    for name, state in after['named_optimizer']['state'].items():
        assert state['step'] == steps
        # The teacher went on from the loaded one: shadow = decay·before + (1 - decay)·policy.
        short = name.removeprefix('policy.')
        shadow = decay * before['teacher']['shadows'][short].double()
        shadow += (1 - decay) * after['state_dict'][name].double()
        found = after['teacher']['shadows'][short].double()
        torch.testing.assert_close(found, shadow, rtol=0, atol=1e-6)
        # AdamW's second moment keeps 0.98 of what was loaded, and never less.
        old = before['named_optimizer']['state'][name]['exp_avg_sq']
        assert bool((state['exp_avg_sq'] >= 0.98 * old - 1e-12).all())


def killed_in_its_second_step(rank: int, root: Path, command: list[str], saved: Path) -> None:
    """Rank 1 dies by ``kill -9`` in the middle of the step behind the first checkpoint."""
    from projects.llava_sam2_rl.engine.split_weights import SplitWeights

    if rank == 1:
        gather, of_the_step = SplitWeights._gather, itertools.count()

        def deadly(self: SplitWeights, wish: int, keep: bool) -> Any:
            if saved.exists() and next(of_the_step) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return gather(self, wish, keep)

        SplitWeights._gather = deadly  # type: ignore[method-assign]
    trainings(rank, root, [command])


@pytest.mark.slow
def test_a_killed_rank_ends_a_run_in_parts_and_the_restart_goes_on(runs, root, tmp_path):
    """As if nothing had happened: the run that was not killed is one of those above."""
    options = [f'load_from={runs / "start" / "iter_1.pth"}', 'train_cfg.max_iters=2']
    command = arguments(root, tmp_path / 'run', 'sft', 'zero3_parts_bf16', *options)
    saved = tmp_path / 'run' / 'iter_1.pth'
    with pytest.raises(RuntimeError, match=r'exit codes \[1, -9\]'):
        run_ranks(killed_in_its_second_step, 2, tmp_path / 'killed', root, command, saved)
    assert not (tmp_path / 'run' / 'iter_2.pth').exists()
    again = arguments(root, tmp_path / 'run', 'sft', 'zero3_parts_bf16', options[1])
    run_ranks(trainings, 2, tmp_path / 'again', root, [resumed(again, 'auto')])
    assert f'Resuming from {saved}' in (tmp_path / 'again' / 'rank0.log').read_text()
    wanted, found = (
        load(folder / 'iter_2.pth') for folder in (runs / 'sft_zero3_parts_bf16', tmp_path / 'run')
    )
    for part in ('state_dict', 'teacher', 'named_optimizer', 'random_states'):
        same(wanted[part], found[part], part)


def test_runs_of_the_whole_table_are_there():
    """Each objective under each mode, one way or another."""
    names = {name for name, *_ in SHORT + RESUMED}
    assert {f'{o}_{m}' for o in OBJECTIVES for m in ('ddp', 'zero1', 'zero2', 'zero3')} <= names
