"""Who may end a data loading worker: its parent, and nobody else."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch
from distributed import wait_until
from torch.utils.data import DataLoader, Dataset

from projects.llava_sam2_rl.engine.dataloader_config import runnable_dataloader
from projects.llava_sam2_rl.engine.worker_processes import SIGNALS, WorkerContext


class Numbers(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor(index), os.getpid()


@pytest.fixture
def process():
    process = WorkerContext().Process(target=time.sleep, args=(600,), daemon=True)
    process.start()
    yield process
    process.kill()
    process.join(60)


@pytest.mark.parametrize('signum', SIGNALS)
def test_a_process_ends_by_its_parents_signal_alone(process, signum):
    # By another process, twice: the second is sent when the first has been taken.
    for _ in range(2):
        subprocess.run(['kill', f'-{signum}', str(process.pid)], check=True)
        wait_until(lambda: not _pending(process.pid))
    assert process.is_alive()
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 0


def _pending(pid):
    with open(f'/proc/{pid}/status') as lines:
        masks = [int(line.split()[1], 16) for line in lines if line.startswith('ShdPnd')]
    assert len(masks) == 1
    return masks[0]


def test_the_parents_own_signals_stay_as_they_were(process):
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_loader_yields_what_one_without_workers_yields():
    def batches(**options):
        return list(DataLoader(Numbers(), batch_size=2, **options))

    workers = batches(num_workers=2, multiprocessing_context=WorkerContext())
    assert [n.tolist() for n, _ in workers] == [n.tolist() for n, _ in batches()]
    pids = {pid for _, each in workers for pid in each.tolist()}
    assert len(pids) == 2
    assert os.getpid() not in pids
    wait_until(lambda: not multiprocessing.active_children())


def test_loops_start_workers_this_way_unless_told_otherwise():
    loader = {'dataset': {'type': 'Numbers'}, 'num_workers': 2}
    assert isinstance(runnable_dataloader(loader, {})['multiprocessing_context'], WorkerContext)
    told = loader | {'multiprocessing_context': 'spawn'}
    assert runnable_dataloader(told, {})['multiprocessing_context'] == 'spawn'
    # DataLoader refuses the option where there are no workers.
    assert 'multiprocessing_context' not in runnable_dataloader(loader | {'num_workers': 0}, {})


def test_batches_lie_in_pinned_memory_where_there_is_a_gpu(monkeypatch):
    loader = {'dataset': {'type': 'Some'}, 'num_workers': 0}
    for is_there in (True, False):
        monkeypatch.setattr('torch.cuda.is_available', lambda found=is_there: found)
        assert runnable_dataloader(loader, {}).get('pin_memory', False) is is_there
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    assert runnable_dataloader(loader | {'pin_memory': False}, {})['pin_memory'] is False
