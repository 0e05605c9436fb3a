"""Toy trainings in processes of their own, which may end in every way."""

import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch
from distributed import join, meeting_point


def ranks(function, number, folder, *args):
    """Runs ``function(rank, *args)`` on each rank; exit codes, and what each printed.

    A single one has no process group. An error gives the exit code 1.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    store, environment = meeting_point() if number > 1 else (None, {})
    # Forked: importing everything anew takes longer than most of these tests.
    context = multiprocessing.get_context('fork')
    processes = [
        context.Process(target=_rank, args=(function, rank, number, environment, folder, args))
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    hanging = join(processes)
    del store
    printed = [(folder / f'rank{rank}.log').read_text() for rank in range(number)]
    assert not hanging, f'ranks {hanging} hang\n' + '\n'.join(printed)
    return [process.exitcode for process in processes], printed


def _rank(function, rank, number, environment, folder, args):
    log = os.open(folder / f'rank{rank}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # pytest has put files of its own in their place.
    sys.stdout = sys.__stdout__ = os.fdopen(1, 'w', buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, 'w', buffering=1, closefd=False)
    torch.set_num_threads(1)
    if number > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(number), LOCAL_RANK=str(rank))
        os.environ.update(environment)
        torch.distributed.init_process_group('gloo')
    try:
        function(rank, *args)
    except Exception:
        traceback.print_exc()
        os._exit(1)
