"""`kill -9` at any moment, 25 times over: the run goes on, and ends as if nothing had happened."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_checkpoint, evaluation, load, newest, training

ROOT = Path(__file__).resolve().parents[1]
KILLS = 25
ITERATIONS = 60
OPTIONS = [
    f'train_cfg.max_iters={ITERATIONS}',
    'train_cfg.val_interval=3',
    'train_dataloader.batch_size=1',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.checkpoint.max_keep_ckpts=2',
    'default_hooks.logger.interval=1',
    'val_dataloader.dataset.length=2',
]
# The runner's call that begins a phase, and about how long it lasts.
PHASES = {
    'step': ('before_train_iter', 0.2),
    'checkpoint': ('before_save_checkpoint', 0.15),
    'evaluation': ('before_val', 0.2),
}


def life(argv: list[str], log: str, started: Any) -> None:
    """A training in a process of its own, which tells its parent what it is about to do."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch
    from mmengine.runner import Runner

    torch.set_num_threads(1)
    calls = [call for call, _ in PHASES.values()]
    call_hook = Runner.call_hook

    def counting(self: Any, name: str, **kwargs: Any) -> None:
        if name in calls:
            started[calls.index(name)] += 1
        call_hook(self, name, **kwargs)

    Runner.call_hook = counting
    spec = importlib.util.spec_from_file_location('launcher', ROOT / 'tools/train.py')
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    launcher.main(argv)


class Lives:
    """Trainings one after another in the same folder."""

    def __init__(self, context: Any, work_dir: Path) -> None:
        self.context = context
        self.work_dir = work_dir
        self.log = work_dir.with_suffix('.log')
        config = ROOT / 'configs/sa2va_tiny_dual_loop_sft.py'
        self.argv = [str(config), '--work-dir', str(work_dir), '--resume', 'auto']
        self.argv += ['--cfg-options', *OPTIONS]

    def begin(self) -> tuple[Any, Any]:
        started = self.context.Array('i', len(PHASES))
        process = self.context.Process(target=life, args=(self.argv, str(self.log), started))
        process.start()
        return process, started

    def to_the_end(self) -> None:
        process, _ = self.begin()
        process.join(300)
        assert process.exitcode == 0, self.log.read_text()[-3000:]

    def killed(self, phase: str, count: int, delay: float) -> None:
        process, started = self.begin()
        index = list(PHASES).index(phase)
        deadline = time.monotonic() + 120
        while started[index] < count:
            assert process.is_alive(), self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL, self.log.read_text()[-3000:]


@pytest.fixture
def context(monkeypatch):
    # The server imports everything once; each life is forked from it.
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(
        ['xtuner.tools.train', 'projects.llava_sam2_rl.models', 'projects.llava_sam2_rl.hooks']
    )
    return context


@pytest.mark.slow
def test_a_run_killed_25_times_ends_as_an_uninterrupted_one(context, tmp_path):
    whole = tmp_path / 'whole'
    Lives(context, whole).to_the_end()

    work_dir = tmp_path / 'run'
    lives = Lives(context, work_dir)
    draw = random.Random(0)
    phases = [list(PHASES)[i % 3] for i in range(KILLS)]
    draw.shuffle(phases)
    reached, unfinished = 0, 0
    for phase in phases:
        count = draw.randint(1, {'step': 3, 'checkpoint': 2, 'evaluation': 1}[phase])
        lives.killed(phase, count, draw.uniform(0, PHASES[phase][1]))
        unfinished += len(list(work_dir.glob('*.incomplete')))
        path = newest(work_dir)
        if path is not None:
            iteration = load(path)['meta']['iter']  # fails where the file is not whole
            assert path.name == f'iter_{iteration}.pth'
            assert iteration >= reached
            reached = iteration
    # Otherwise the kills missed what they are for.
    assert unfinished > 0
    assert 0 < reached < ITERATIONS

    lives.to_the_end()
    final = f'iter_{ITERATIONS}.pth'
    assert newest(work_dir) == work_dir / final
    assert_same_checkpoint(work_dir / final, whole / final)
    assert not list(work_dir.glob('*.incomplete'))
    assert training(work_dir) == training(whole)
    assert sorted(evaluation(whole)) == list(range(3, ITERATIONS + 1, 3))
    assert evaluation(work_dir) == evaluation(whole)
