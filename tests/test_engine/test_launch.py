"""What a distributed run refuses at its start, and how it ends when one of its ranks fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import PATIENCE, free_port, run_ranks, train
from mmengine.config import Config
from runs import load
from test_tools.test_distributed_training import arguments

from projects.llava_sam2_rl.engine.launch import prepare, run

ROOT = Path(__file__).resolve().parents[2]


def failing_rank(rank: int, bad: int, port: int | None) -> None:
    """One rank fails in its own code, the other waits for it in a collective."""
    if port is not None:  # as without torchrun: the store is rank 0's
        del os.environ['TORCHELASTIC_USE_AGENT_STORE']
        os.environ['MASTER_PORT'] = str(port)
    prepare('pytorch', None)

    def main() -> None:
        for _ in range(3):
            torch.distributed.all_reduce(torch.ones(1))
        if rank == bad:
            raise ValueError(f'the data of rank {rank} is bad')
        torch.distributed.all_reduce(torch.ones(1))

    run(main)


@pytest.mark.parametrize('torchrun', [False, True])
@pytest.mark.parametrize('bad', [0, 1])
def test_a_rank_that_fails_ends_all_and_its_traceback_is_last(bad, torchrun, tmp_path):
    port = None if torchrun else free_port()
    with pytest.raises(RuntimeError, match='exit codes'):
        run_ranks(failing_rank, 2, tmp_path, bad, port)
    failed, other = ((tmp_path / f'rank{r}.log').read_text() for r in (bad, 1 - bad))
    assert failed.strip().endswith(f'ValueError: the data of rank {bad} is bad')
    assert f'rank {bad} failed:' in failed
    if bad == 0 and not torchrun and 'rank 0 has gone' in other:
        # With it has gone the store that held its traceback.
        assert 'rank 1 failed:\nTraceback' in other
    else:
        assert f'rank {1 - bad} stops because another rank failed.' in other
        assert other.strip().endswith(f'ValueError: the data of rank {bad} is bad')


def refused(folder: Path, objective: str, mode: str, *more: str, deepspeed: Path | None = None):
    """The message with which a run of two ranks ends."""
    command = arguments(ROOT, folder / 'run', objective, mode, *more)
    if deepspeed is not None:
        command[command.index('--deepspeed') + 1] = str(deepspeed)
    with pytest.raises(RuntimeError) as error:
        run_ranks(train, 2, folder / 'logs', ROOT, command)
    text = (folder / 'logs' / 'rank0.log').read_text()
    assert 'Iter(train)' not in text
    assert (folder / 'logs' / 'rank1.log').read_text()
    return str(error.value)


def edited(folder: Path, stage: int, old: str, new: str) -> Path:
    text = (ROOT / f'configs/deepspeed/zero{stage}_fp32.json').read_text()
    assert old in text
    path = folder / 'edited.json'
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.slow
def test_gradient_surgery_is_refused_under_deepspeed(tmp_path):
    text = refused(tmp_path, 'gumbel', 'zero2', 'model.objective.gradient_surgery=True')
    assert 'gradient_surgery needs the gradients of both directions apart' in text


@pytest.mark.slow
def test_deepspeed_without_zero_is_refused(tmp_path):
    path = edited(tmp_path, 1, '"stage": 1', '"stage": 0')
    text = refused(tmp_path, 'sft', 'zero1', deepspeed=path)
    assert 'use ZeRO stage 1, 2 or 3' in text


@pytest.mark.slow
def test_more_ranks_than_data_are_refused(tmp_path):
    command = arguments(ROOT, tmp_path / 'run', 'sft', 'ddp')
    small = Config.fromfile(command[0])
    small.train_dataloader.dataset.datasets = small.train_dataloader.dataset.datasets[:1]
    small.train_dataloader.dataset.datasets[0].length = 1
    config = tmp_path / 'small.py'
    small.dump(config)
    command[0] = str(config)
    with pytest.raises(RuntimeError, match='2 ranks, but the training data has 1 samples'):
        run_ranks(train, 2, tmp_path / 'logs', ROOT, command)


def test_a_launcher_that_was_not_used_is_named(monkeypatch):
    for key in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(KeyError, match='--launcher pytorch needs RANK, WORLD_SIZE, LOCAL_RANK'):
        prepare('pytorch', None)


PORT = """
import socket, sys
from projects.llava_sam2_rl.engine.launch import prepare
taken = socket.socket()
taken.bind(('127.0.0.1', 0))
taken.listen()
import os
os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                  MASTER_PORT=str(taken.getsockname()[1]))
prepare('pytorch', None)
"""


def test_a_port_that_is_taken_is_named():
    done = subprocess.run(
        [sys.executable, '-c', PORT], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, 'PYTHONWARNINGS': 'ignore'}, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode != 0
    assert 'port' in done.stderr.strip().splitlines()[-1]
    assert 'MASTER_PORT' in done.stderr.strip().splitlines()[-1]


ALONE = """
import os
from projects.llava_sam2_rl.engine import launch
launch._SECONDS_TO_MEET = 2
os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                  MASTER_PORT='0')
launch.prepare('pytorch', None)
"""


def test_a_wrong_number_of_processes_is_named():
    done = subprocess.run(
        [sys.executable, '-c', ALONE], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, 'PYTHONWARNINGS': 'ignore'}, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert 'rank 0 of 2 did not meet the others at 127.0.0.1:0 within 2 s' in last
    assert '--nproc-per-node' in last


@pytest.mark.slow
def test_torchrun_trains_and_resumes_as_users_start_it(tmp_path):
    """In processes that have imported nothing before, unlike those of the other tests."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    for iterations in (1, 2):
        more = f'train_cfg.max_iters={iterations}'
        command = arguments(ROOT, tmp_path / 'run', 'sft', 'zero2', more)
        command[1:1] = ['--resume', 'auto']
        done = subprocess.run(
            [*start, str(ROOT / 'tools/train.py'), *command], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        saved = load(tmp_path / 'run' / f'iter_{iterations}.pth')
        assert saved['teacher']['num_updates'] == iterations
        assert all(s['step'] == iterations for s in saved['named_optimizer']['state'].values())
