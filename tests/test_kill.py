"""`kill -9` at any moment, 25 times over: the run goes on, and ends as if nothing had happened."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import PATIENCE
from runs import assert_same_checkpoint, evaluation, load, newest, training

ROOT = Path(__file__).resolve().parents[1]
KILLS = 25
ITERATIONS = 48
OPTIONS = [
    f'train_cfg.max_iters={ITERATIONS}',
    'train_cfg.val_interval=3',
    'train_dataloader.batch_size=1',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.checkpoint.max_keep_ckpts=2',
    'default_hooks.logger.interval=1',
    'val_dataloader.dataset.length=2',
]
# Called at the begin and at the end of each phase; `put` writes the file of a checkpoint, for a few
# hundredths of a second.
PHASES = {
    'step': ('before_train_iter', 'after_train_iter'),
    'checkpoint': ('before_save_checkpoint', 'saved'),
    'file': ('put', 'saved'),
    'evaluation': ('before_val', 'after_val'),
}


def life(argv: list[str], log: str, calls: Any, written: float | None = None) -> None:
    """A training in a process of its own, which tells its parent what it is about to do.

    With ``written`` it dies by itself when so much of its first checkpoint is in the file, of
    which another process could hardly tell in time.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import mmengine.config.config
    import torch
    from mmengine.runner import Runner

    from projects.llava_sam2_rl.engine.checkpoint_files import AtomicLocalBackend

    torch.set_num_threads(1)
    # Laying out the config's text, several times over, is half of a start.
    mmengine.config.config.FormatCode = lambda text, **_: (text, True)
    call_hook, put, fsync = Runner.call_hook, AtomicLocalBackend.put, os.fsync

    def telling_call_hook(self: Any, name: str, **kwargs: Any) -> None:
        calls.send((name, time.monotonic()))
        call_hook(self, name, **kwargs)

    def telling_put(*args: Any) -> None:
        calls.send(('put', time.monotonic()))
        put(*args)
        calls.send(('saved', time.monotonic()))

    def die(descriptor: int) -> None:
        path = Path(f'/proc/self/fd/{descriptor}').readlink()
        if '.pth.' in path.name:  # `iter_N.pth.incomplete`
            os.truncate(path, int(path.stat().st_size * written))
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    if written is not None:
        os.fsync = die
    Runner.call_hook, AtomicLocalBackend.put = telling_call_hook, telling_put
    spec = importlib.util.spec_from_file_location('launcher', ROOT / 'tools/train.py')
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    launcher.main(argv)


class Lives:
    """Trainings one after another in the same folder."""

    def __init__(self, context: Any, work_dir: Path) -> None:
        self.context = context
        self.log = work_dir.with_suffix('.log')
        config = ROOT / 'configs/sa2va_tiny_dual_loop_sft.py'
        self.argv = [str(config), '--work-dir', str(work_dir), '--resume', 'auto']
        self.argv += ['--cfg-options', *OPTIONS]

    def begin(self, written: float | None = None) -> tuple[Any, Any]:
        calls, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=life, args=(self.argv, str(self.log), theirs, written)
        )
        process.start()
        theirs.close()
        return process, calls

    def next_call(self, calls: Any) -> tuple[str, float] | None:
        """What the training does next and when; none when it has ended."""
        assert calls.poll(PATIENCE), self.log.read_text()[-3000:]
        try:
            return calls.recv()
        except EOFError:
            return None

    def to_the_end(self) -> dict[str, float]:
        """Median seconds of each phase."""
        process, calls = self.begin()
        began: dict[str, float] = {}
        seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        while call := self.next_call(calls):
            name, at = call
            for phase, (begin, end) in PHASES.items():
                if name == begin:
                    began[phase] = at
                elif name == end:
                    seconds[phase].append(at - began[phase])
        process.join(PATIENCE)
        assert process.exitcode == 0, self.log.read_text()[-3000:]
        return {phase: statistics.median(values) for phase, values in seconds.items()}

    def killed(self, phase: str, count: int, delay: float) -> None:
        """Kills the training so many seconds into the phase, when it comes the n-th time."""
        process, calls = self.begin()
        while count:
            call = self.next_call(calls)
            assert call is not None, self.log.read_text()[-3000:]
            count -= call[0] == PHASES[phase][0]
        time.sleep(delay)
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL, self.log.read_text()[-3000:]

    def killed_while_writing(self, written: float) -> None:
        """The training dies when so much of a checkpoint is written."""
        process, calls = self.begin(written)
        while self.next_call(calls):
            pass
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL, self.log.read_text()[-3000:]


@pytest.fixture
def context(monkeypatch):
    # The server imports everything once; each life is forked from it.
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(
        [
            'projects.llava_sam2_rl.engine.entry',
            'projects.llava_sam2_rl.models',
            'projects.llava_sam2_rl.hooks',
        ]
    )
    return context


@pytest.mark.slow
def test_a_run_killed_25_times_ends_as_an_uninterrupted_one(context, tmp_path):
    whole = tmp_path / 'whole'
    seconds = Lives(context, whole).to_the_end()

    work_dir = tmp_path / 'run'
    lives = Lives(context, work_dir)
    draw = random.Random(0)
    phases = [list(PHASES)[i % len(PHASES)] for i in range(KILLS)]
    draw.shuffle(phases)
    reached, unfinished = 0, 0
    for phase in phases:
        if phase == 'file':
            lives.killed_while_writing(draw.random())
        else:
            count = draw.randint(1, 3) if phase == 'step' else 1
            lives.killed(phase, count, draw.uniform(0, seconds[phase]))
        unfinished += len(list(work_dir.glob('*.incomplete')))
        path = newest(work_dir)
        if path is not None:
            iteration = load(path)['meta']['iter']  # fails where the file is not whole
            assert path.name == f'iter_{iteration}.pth'
            assert iteration >= reached
            reached = iteration
    # Otherwise the kills missed what they are for.
    assert unfinished >= phases.count('file')
    assert 0 < reached < ITERATIONS

    lives.to_the_end()
    final = f'iter_{ITERATIONS}.pth'
    assert newest(work_dir) == work_dir / final
    assert_same_checkpoint(work_dir / final, whole / final)
    assert not list(work_dir.glob('*.incomplete'))
    assert training(work_dir) == training(whole)
    due = set(range(3, ITERATIONS + 1, 3))
    assert set(evaluation(whole)) - {0} == due  # 0: before the training
    assert evaluation(work_dir) == evaluation(whole)
