"""SIGTERM and SIGUSR1 at every moment: a checkpoint, the exit code, and an exact continuation."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from distributed import wait_until
from mmengine.hooks import Hook

from projects.llava_sam2_rl.engine.worker_processes import WorkerContext
from projects.llava_sam2_rl.hooks import (
    REQUEUE_EXIT_CODE,
    EMATeacherHook,
    PreemptionHook,
    ResumedValidationHook,
)
from projects.llava_sam2_rl.hooks.preemption import INTERRUPT_EXIT_CODE, resume_command
from test_hooks import toy
from test_hooks.processes import ranks


class Signal(Hook):
    """Sends a signal to this process in the middle of a step or an evaluation."""

    def __init__(self, at, signum=signal.SIGTERM, in_evaluation=False, rank=0):
        self.at, self.signum, self.rank = at, signum, rank
        self.in_evaluation = in_evaluation

    def send(self, iteration):
        mine = not torch.distributed.is_initialized() or torch.distributed.get_rank() == self.rank
        if iteration == self.at and mine:
            os.kill(os.getpid(), self.signum)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if not self.in_evaluation:
            self.send(runner.iter + 1)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if self.in_evaluation and batch_idx == 2:
            self.send(runner.iter)


def hooks(at=None, exit_code=REQUEUE_EXIT_CODE, **options):
    return [
        {'type': EMATeacherHook},
        {'type': Signal, 'at': at, **options},
        {'type': ResumedValidationHook},
        {'type': PreemptionHook, 'exit_code': exit_code},
    ]


def build(work_dir, at=None, **options):
    own = {k: options.pop(k) for k in ('signum', 'in_evaluation', 'rank') if k in options}
    return toy.build(work_dir, hooks=hooks(at, **own), **options)


def preempted(work_dir, at, **options):
    runner = build(work_dir, at, **options)
    with pytest.raises(SystemExit) as stop:
        runner.train()
    assert stop.value.code == REQUEUE_EXIT_CODE == 85
    return runner


def state(path):
    return torch.load(path, map_location='cpu', weights_only=False)


def assert_same_weights(a, b):
    first, second = state(a), state(b)
    assert first['meta']['iter'] == second['meta']['iter']
    for part in (first['state_dict'], first['teacher']['shadows']):
        other = second['state_dict' if part is first['state_dict'] else 'teacher']
        other = other.get('shadows', other)
        assert part.keys() == other.keys()
        assert all(torch.equal(part[key], other[key]) for key in part)


@pytest.fixture(autouse=True)
def handlers():
    """The default handlers, found again after the test."""
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(s) for s in signals]
    yield
    assert [signal.getsignal(s) for s in signals] == before


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGUSR1])
def test_it_saves_after_the_step_and_the_resumed_run_is_exact(tmp_path, signum):
    build(tmp_path / 'whole', interval=6).train()
    runner = preempted(tmp_path / 'run', 3, interval=6, signum=signum)
    assert runner.iter == 2  # counted after the hooks: the third iteration was the last
    assert (tmp_path / 'run/last_checkpoint').read_text() == str(tmp_path / 'run/iter_3.pth')
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert f'{signum.name}: the run stops after iteration 3 with exit code 85' in log
    build(tmp_path / 'run', resume=True, interval=6).train()
    assert_same_weights(tmp_path / 'whole/iter_6.pth', tmp_path / 'run/iter_6.pth')


def test_ctrl_c_saves_after_the_step_and_says_how_to_go_on(tmp_path, monkeypatch, capfd):
    build(tmp_path / 'whole', interval=6).train()
    argv = ['tools/train.py', 'a b.py', '--resume', 'iter_1.pth', '--cfg-options', 'x=1']
    monkeypatch.setattr(sys, 'argv', argv)
    runner = build(tmp_path / 'run', 3, interval=6, signum=signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        runner.train()
    assert stop.value.code == INTERRUPT_EXIT_CODE == 130
    assert 'the run saves after this step and ends; again: at once' in capfd.readouterr().err
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert 'SIGINT: the run stops after iteration 3 with exit code 130' in log
    assert "  python tools/train.py 'a b.py' --cfg-options x=1 --resume auto\n" in log
    build(tmp_path / 'run', resume=True, interval=6).train()
    assert_same_weights(tmp_path / 'whole/iter_6.pth', tmp_path / 'run/iter_6.pth')


def test_ctrl_c_twice_ends_at_once(tmp_path):
    codes, printed = ranks(_press_twice, 1, tmp_path / 'logs', tmp_path / 'run')
    assert codes == [130], printed
    assert not list((tmp_path / 'run').glob('*.pth'))


class PressTwice(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            for wait in (0, 0.6):  # a terminal's and a launcher's copy of one press come together
                time.sleep(wait)
                os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError('still here')


def _press_twice(rank, work_dir):
    own = [{'type': EMATeacherHook}, {'type': PressTwice}, {'type': PreemptionHook}]
    toy.build(work_dir, hooks=own, interval=6).train()


ELASTIC = {'TORCHELASTIC_RUN_ID': 'none', 'WORLD_SIZE': '4', 'LOCAL_WORLD_SIZE': '2'}
SLURM = {'SLURM_PROCID': '0', 'WORLD_SIZE': '4'}


@pytest.mark.parametrize(
    ('argv', 'environ', 'command'),
    [
        ('tools/train.py c.py --resume=auto', {}, 'python tools/train.py c.py --resume auto'),
        ('tools/train.py c.py --resume x.pth', {}, 'python tools/train.py c.py --resume auto'),
        (
            'tools/train.py c.py --launcher pytorch',
            ELASTIC,
            'torchrun --nproc_per_node 2 tools/train.py c.py --launcher pytorch --resume auto',
        ),
        (
            'tools/train.py c.py --launcher slurm',
            SLURM,
            'srun python tools/train.py c.py --launcher slurm --resume auto',
        ),
        # xtuner's own `--resume` takes a file, and it adds the launcher itself.
        ('/x/xtuner/tools/train.py c.py', {}, 'xtuner train c.py --resume w/iter_3.pth'),
        (
            '/x/xtuner/tools/train.py c.py --launcher pytorch',
            ELASTIC,
            'NPROC_PER_NODE=2 xtuner train c.py --resume w/iter_3.pth',
        ),
    ],
)
def test_the_command_that_goes_on(monkeypatch, argv, environ, command):
    monkeypatch.setattr(sys, 'argv', argv.split())
    for name in {*ELASTIC, *SLURM}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert resume_command('w/iter_3.pth') == command


def test_in_an_evaluation_it_saves_the_iteration_before_and_evaluates_again(tmp_path):
    options = {'interval': 6, 'val_interval': 2}
    toy.Score.value = 0.0
    build(tmp_path / 'whole', **options).train()
    assert toy.Score.value == pytest.approx(0.3)  # three evaluations

    toy.Score.value = 0.0
    preempted(tmp_path / 'run', 4, in_evaluation=True, **options)
    assert toy.Score.value == pytest.approx(0.1)  # the second was cut short
    assert state(tmp_path / 'run/iter_4.pth')['meta']['iter'] == 4
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert 'the run stops after iteration 4, in its evaluation' in log
    build(tmp_path / 'run', resume=True, **options).train()
    assert toy.Score.value == pytest.approx(0.3)
    assert_same_weights(tmp_path / 'whole/iter_6.pth', tmp_path / 'run/iter_6.pth')


# What mmengine does where an optimizer step takes several iterations.
@pytest.mark.filterwarnings('ignore:Detected call of `scheduler.step:UserWarning')
def test_accumulated_gradients_are_stepped_before_it_stops(tmp_path):
    options = {'interval': 6, 'accumulative_counts': 2}
    build(tmp_path / 'whole', **options).train()
    preempted(tmp_path / 'run', 3, **options)
    assert sorted(path.name for path in (tmp_path / 'run').glob('*.pth')) == ['iter_4.pth']
    build(tmp_path / 'run', resume=True, **options).train()
    assert_same_weights(tmp_path / 'whole/iter_6.pth', tmp_path / 'run/iter_6.pth')


def test_the_exit_code_is_an_option(tmp_path):
    runner = toy.build(tmp_path, hooks=hooks(1, exit_code=99))
    with pytest.raises(SystemExit) as stop:
        runner.train()
    assert stop.value.code == 99


def test_without_a_checkpoint_hook_it_says_so(tmp_path):
    runner = build(tmp_path, 2)
    runner._hooks = [h for h in runner.hooks if type(h).__name__ != 'AtomicCheckpointHook']
    with pytest.raises(SystemExit):
        runner.train()
    assert 'no checkpoint was written' in next(tmp_path.glob('*/*.log')).read_text()


def test_options_out_of_range_are_refused():
    for code in (0, 126, 256):
        with pytest.raises(ValueError, match='exit_code'):
            PreemptionHook(exit_code=code)
    with pytest.raises(ValueError, match='SIGTREM'):
        PreemptionHook(signals=['SIGUSR1', 'SIGTREM'])
    with pytest.raises(ValueError, match='SIGKILL'):
        PreemptionHook(signals=['SIGKILL'])


def test_a_signal_on_one_rank_stops_all_after_the_same_iteration(tmp_path):
    codes, printed = ranks(_train, 2, tmp_path / 'logs', tmp_path / 'run')
    assert codes == [85, 85], printed
    assert len(state(tmp_path / 'run/iter_3.pth')['random_states']) == 2


def _train(rank, work_dir):
    build(work_dir, 3, rank=1, interval=6).train()


@pytest.mark.parametrize('library', ['none', 'unblocks', 'thread', 'wandb'])
def test_workers_leave_the_signals_to_the_training_and_end_with_it(tmp_path, library):
    if library == 'wandb' and importlib.util.find_spec('wandb') is None:
        pytest.skip('wandb is in requirements-dev.txt')
    codes, printed = ranks(_train_with_workers, 1, tmp_path / 'logs', tmp_path / 'run', library)
    assert codes == [85], printed
    assert (tmp_path / 'run/iter_15.pth').is_file()


class SignalAll(Hook):
    """A scheduler signals every process of a job, and the training last."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            self.workers = multiprocessing.active_children()
            assert len(self.workers) == 2
            for name, signum in (
                ('-USR1', signal.SIGUSR1),
                ('-INT', signal.SIGINT),
                ('-TERM', signal.SIGTERM),
            ):
                # By another process: what their parent sends they obey.
                pids = [str(worker.pid) for worker in self.workers]
                subprocess.run(['kill', name, *pids], check=True)
                wait_until(lambda s=signum: not any(pending(w.pid, s) for w in self.workers))
        # More batches later than the workers had made when the signals came.
        if runner.iter == 14:
            assert set(multiprocessing.active_children()) == set(self.workers)
            os.kill(os.getpid(), signal.SIGTERM)


def pending(pid, signum):
    """Whether a process has been sent a signal that it has not taken yet."""
    status = Path(f'/proc/{pid}/status').read_text()
    masks = [line.split()[1] for line in status.splitlines() if line[:6] in ('SigPnd', 'ShdPnd')]
    assert len(masks) == 2
    return any(int(mask, 16) >> (signum - 1) & 1 for mask in masks)


def _unblock(worker_id, **_):
    """As a library might."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def _train_with_workers(rank, work_dir, library):
    loader = toy.loader() | {'num_workers': 2, 'multiprocessing_context': WorkerContext()}
    if library == 'unblocks':
        loader['worker_init_fn'] = {'type': _unblock}
    if library == 'thread':
        # In every process that is forked, from its start.
        os.register_at_fork(after_in_child=_start_thread)
    if library == 'wandb':  # the same, and by native code
        import wandb

        os.environ['WANDB_SILENT'] = 'true'
        wandb.init(project='test', mode='offline', dir=str(work_dir.parent))
    toy.loader = lambda *_, **__: loader
    own = [{'type': EMATeacherHook}, {'type': SignalAll}, {'type': PreemptionHook}]
    toy.build(work_dir, hooks=own, interval=20, max_iters=20).train()


def _start_thread():
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
