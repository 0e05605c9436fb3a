"""What stands still is ended: the stacks of every rank, a message, exit status 124."""

from __future__ import annotations

import faulthandler
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook

from projects.llava_sam2_rl.hooks import WatchdogHook, watchdog
from test_hooks import toy
from test_hooks.processes import ranks

FOR_EVER = 3600


class Clock:
    """Runs while a test stands still only, however slow the machine is in between."""

    def __init__(self):
        # Seconds until it last stopped, and when it was started since; as one value, since the
        # thread that watches reads it too.
        self._state = 0.0, None

    def __call__(self):
        before, since = self._state
        return before if since is None else before + time.monotonic() - since

    def start(self):
        self._state = self(), time.monotonic()

    def sleep(self, seconds):
        """Stands still."""
        self.start()
        time.sleep(seconds)
        self._state = self(), None


CLOCK = Clock()


def build(work_dir, hooks, last_resort=False, **options):
    """A toy in a process of its own, watched by `CLOCK`."""
    watchdog.time = SimpleNamespace(monotonic=CLOCK, sleep=time.sleep, strftime=time.strftime)
    if not last_resort:  # what ends a blocked interpreter has the machine's clock
        watchdog.faulthandler = SimpleNamespace(
            dump_traceback=faulthandler.dump_traceback,
            dump_traceback_later=lambda *_, **__: None,
            cancel_dump_traceback_later=lambda: None,
        )
    return toy.build(work_dir, hooks=hooks, **options)


class Stuck(Hook):
    """One rank stands still at a call; another thread of it is busy elsewhere."""

    def __init__(self, call, at, rank=0):
        self.at, self.rank = at, rank
        setattr(self, call, self.stand_still)

    def stand_still(self, runner, *args, **kwargs):
        mine = not torch.distributed.is_initialized() or torch.distributed.get_rank() == self.rank
        if runner.iter == self.at and mine:
            threading.Thread(target=a_thread_of_its_own, daemon=True).start()
            CLOCK.sleep(FOR_EVER)


class Together(Hook):
    """What a distributed step does: every rank waits for all."""

    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.at:
            CLOCK.start()
        torch.distributed.all_reduce(torch.ones(1))


def a_thread_of_its_own():
    time.sleep(FOR_EVER)


def train(rank, work_dir, call, at, limits, stuck_rank=0, **options):
    hooks = [{'type': WatchdogHook, 'grace': 0.5, **limits}]
    if torch.distributed.is_initialized():
        hooks.append({'type': Together, 'at': at})
    hooks.append({'type': Stuck, 'call': call, 'at': at, 'rank': stuck_rank})
    build(work_dir, hooks, **options).train()


def test_every_rank_dumps_every_threads_stack_and_ends(tmp_path):
    codes, printed = ranks(
        train, 2, tmp_path, tmp_path / 'run', 'before_train_iter', 3, {'timeout': 2}, 1
    )
    assert codes == [124, 124], printed
    for rank, where in enumerate(('all_reduce', 'stand_still')):
        dump = (tmp_path / f'run/watchdog_rank{rank}.txt').read_text()
        for text in (dump, printed[rank]):
            assert re.search(
                rf'watchdog: rank {rank} on \S+ \(process \d+\): '
                # The rank that waits has its own step behind it.
                rf'the iteration after iteration {4 - rank} has taken more than 2 s\.',
                text,
            )
            assert re.search(rf'File ".*", line \d+ in {where}\n', text)
        assert 'raise the limit in WatchdogHook(...)' in dump
        assert printed[rank].rstrip().endswith('The process ends.')
    # Of the rank that stands still, all threads are there.
    assert 'in a_thread_of_its_own' in (tmp_path / 'run/watchdog_rank1.txt').read_text()


@pytest.mark.parametrize(
    ('call', 'at', 'limits', 'phase'),
    [
        ('before_train_iter', 0, {'first_timeout': 1}, 'the first iteration after iteration 0'),
        ('before_save_checkpoint', 1, {'checkpoint_timeout': 1}, 'checkpoint after iteration 2'),
        # After a checkpoint, whose limit was another.
        (
            'before_train_iter',
            2,
            {'timeout': 1, 'checkpoint_timeout': None},
            'the iteration after iteration 2',
        ),
        ('before_val_iter', 2, {'evaluation_timeout': 1}, 'the evaluation after iteration 2'),
    ],
)
def test_each_phase_has_a_limit_of_its_own(tmp_path, call, at, limits, phase):
    options = {'val_interval': 2} if 'evaluation_timeout' in limits else {}
    codes, printed = ranks(_train, 1, tmp_path, tmp_path / 'run', call, at, limits, options)
    assert codes == [124], printed
    assert phase in (tmp_path / 'run/watchdog_rank0.txt').read_text()
    assert 'in stand_still' in printed[0]


def _train(rank, work_dir, call, at, limits, options):
    train(rank, work_dir, call, at, limits, **options)


class Slow(Hook):
    """The first iteration, checkpoints and evaluations take longer than an iteration may."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        CLOCK.sleep(1.3 if runner.iter == 0 else 0.1)

    def before_save_checkpoint(self, runner, checkpoint):
        CLOCK.sleep(1.3)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        CLOCK.sleep(0.25)


def test_a_slow_phase_within_its_limit_goes_on(tmp_path):
    codes, printed = ranks(_slow, 1, tmp_path, tmp_path / 'run')
    assert codes == [0], printed
    assert not list(tmp_path.glob('run/watchdog_*'))
    assert 'watchdog' not in printed[0]


def _slow(rank, work_dir):
    # Six batches of an evaluation take longer than the limit of one.
    limits = {
        'timeout': 1.2,
        'first_timeout': 30,
        'checkpoint_timeout': 30,
        'evaluation_timeout': 1.4,
    }
    hooks = [{'type': WatchdogHook, **limits}, {'type': Slow}]
    build(work_dir, hooks, max_iters=2, interval=2, val_interval=2).train()
    CLOCK.sleep(1.5)  # the training is over, and nobody watches


def test_a_blocked_interpreter_is_ended_from_outside(tmp_path):
    codes, printed = ranks(_blocked, 1, tmp_path, tmp_path / 'run')
    assert codes == [1]  # faulthandler's own
    assert 'Timeout' in printed[0]
    assert 'in hold_the_interpreter' in printed[0]


class Blocked(Hook):
    """A library that keeps the interpreter's lock."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1:
            hold_the_interpreter()


def hold_the_interpreter():
    import ctypes

    ctypes.PyDLL(None).sleep(FOR_EVER)


def _blocked(rank, work_dir):
    # In real time from the end of the first iteration; the second blocks long before.
    hooks = [{'type': WatchdogHook, 'timeout': 5, 'grace': 0.2}, {'type': Blocked}]
    build(work_dir, hooks, last_resort=True).train()


def test_a_work_dir_that_cannot_be_written_is_said(tmp_path):
    codes, printed = ranks(_no_folder, 1, tmp_path, tmp_path / 'run')
    assert codes == [124]
    assert 'watchdog: [Errno 2] No such file or directory' in printed[0]
    assert 'in stand_still' in printed[0]


def _no_folder(rank, work_dir):
    import shutil

    class Gone(Stuck):
        def stand_still(self, runner, *args, **kwargs):
            shutil.rmtree(work_dir)
            CLOCK.sleep(FOR_EVER)

    hooks = [{'type': WatchdogHook, 'first_timeout': 0.5, 'grace': 0.1}]
    hooks.append({'type': Gone, 'call': 'before_train_iter', 'at': 0})
    build(work_dir, hooks).train()


@pytest.mark.parametrize(
    ('name', 'phase'),
    [
        ('timeout', 'iteration'),
        ('first_timeout', 'first iteration'),
        ('checkpoint_timeout', 'checkpoint'),
        ('evaluation_timeout', 'evaluation'),
    ],
)
def test_limits_that_are_not_positive_are_refused(name, phase):
    with pytest.raises(ValueError, match=f'the limit of the {phase} must be positive or None'):
        WatchdogHook(**{name: 0})


def test_none_leaves_a_phase_unwatched(tmp_path):
    codes, printed = ranks(_unwatched, 1, tmp_path, tmp_path / 'run')
    assert codes == [0], printed


def _unwatched(rank, work_dir):
    limits = {'timeout': None, 'first_timeout': None, 'evaluation_timeout': 0.3}
    hooks = [{'type': WatchdogHook, **limits}, {'type': Slow}]
    build(work_dir, hooks, max_iters=2).train()
