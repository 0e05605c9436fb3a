"""Each evaluation that is due is done once, wherever a run was cut short."""

from __future__ import annotations

import os
import signal

import pytest
from mmengine.hooks import Hook

from projects.llava_sam2_rl.hooks import EMATeacherHook, ResumedValidationHook
from test_hooks import toy
from test_hooks.processes import ranks

HOOKS = [{'type': EMATeacherHook}, {'type': ResumedValidationHook}]


class Evaluations(Hook):
    """Iterations after which an evaluation was finished."""

    priority = 'LOWEST'
    done: list[int]

    def after_val(self, runner):
        Evaluations.done.append(runner.iter)


def train(work_dir, **options):
    """The iterations after which the run evaluated."""
    Evaluations.done = []
    hooks = [*HOOKS, {'type': Evaluations}]
    toy.build(work_dir, hooks=hooks, val_interval=2, **options).train()
    return Evaluations.done


class Die(Hook):
    """``kill -9`` in an evaluation."""

    def __init__(self, at):
        self.at = at

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at and batch_idx == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_in_evaluation(work_dir, at, **options):
    def run(rank):
        hooks = [*HOOKS, {'type': Die, 'at': at}]
        toy.build(work_dir, hooks=hooks, val_interval=2, **options).train()

    codes, printed = ranks(run, 1, work_dir.with_suffix('.logs'))
    assert codes == [-signal.SIGKILL], printed


def test_an_uninterrupted_run_evaluates_as_configured(tmp_path):
    assert train(tmp_path) == [2, 4, 6]
    assert (tmp_path / 'last_validation').read_text() == '6\n'


@pytest.mark.parametrize(('at', 'made_up'), [(2, [2, 4, 6]), (4, [4, 6]), (6, [6])])
def test_an_evaluation_cut_short_is_made_up_for(tmp_path, at, made_up):
    killed_in_evaluation(tmp_path, at)
    assert train(tmp_path, resume=True) == made_up
    log = max(tmp_path.glob('*/*.log')).read_text()
    assert 'Traceback' not in log


def test_the_last_one_is_due_whatever_the_interval(tmp_path):
    assert train(tmp_path / 'whole', max_iters=5) == [2, 4, 5]
    killed_in_evaluation(tmp_path / 'run', 5, max_iters=5)
    assert train(tmp_path / 'run', max_iters=5, resume=True) == [5]


def test_one_that_was_finished_is_not_done_twice(tmp_path):
    assert train(tmp_path, max_iters=4) == [2, 4]
    assert train(tmp_path, max_iters=6, resume=True) == [6]
    # Complete, and started once more.
    assert train(tmp_path, max_iters=6, resume=True) == []


def test_where_none_was_due_none_is_made_up_for(tmp_path):
    # Killed in the evaluation after 4; its newest checkpoint is of iteration 3.
    killed_in_evaluation(tmp_path, 4, interval=3)
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_3.pth')
    assert train(tmp_path, resume=True, interval=3) == [4, 6]


def test_a_new_run_in_the_folder_of_an_old_one_starts_without(tmp_path):
    assert train(tmp_path, max_iters=4) == [2, 4]
    assert train(tmp_path, max_iters=4) == [2, 4]


def test_runs_in_epochs_and_runs_without_validation_are_left_alone(tmp_path):
    toy.build(tmp_path / 'epochs', hooks=HOOKS, epochs=2).train()
    toy.build(tmp_path / 'epochs', hooks=HOOKS, epochs=3, resume=True).train()
    toy.build(tmp_path / 'none', hooks=HOOKS, max_iters=4).train()
    toy.build(tmp_path / 'none', hooks=HOOKS, resume=True).train()
    assert not list(tmp_path.glob('*/last_validation'))
