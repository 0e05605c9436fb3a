"""Real processes that talk to each other, for tests.

They come from multiprocessing's fork server, which has imported everything once: a rank starts in
a fraction of a second instead of ten.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PRELOAD = [
    'projects.llava_sam2_rl.models',
    'projects.llava_sam2_rl.hooks',
    'xtuner.tools.train',
    'deepspeed',
]


def run_ranks(
    function: Callable[..., Any], ranks: int, folder: Path, *args: Any, timeout: float = 240
) -> list[Any]:
    """What ``function(rank, *args)`` returned on each rank.

    Raises:
        RuntimeError: A rank failed; the message holds the tracebacks.
        TimeoutError: A rank was not done in time.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(_PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    processes = [
        context.Process(target=_rank, args=(function, rank, ranks, port, folder, args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    logs = [(folder / f'rank{rank}.log').read_text() for rank in range(ranks)]
    text = '\n'.join(f'--- rank {rank}\n{log[-4000:]}' for rank, log in enumerate(logs))
    if hanging:
        raise TimeoutError(f'ranks {hanging} hang\n{text}')
    if any(process.exitcode for process in processes):
        raise RuntimeError(f'exit codes {[p.exitcode for p in processes]}\n{text}')
    return [
        torch.load(folder / f'rank{rank}.pt', weights_only=False, map_location='cpu')
        for rank in range(ranks)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def _rank(
    function: Callable[..., Any], rank: int, ranks: int, port: int, folder: Path, args: tuple
) -> None:
    torch.set_num_threads(1)
    # DeepSpeed collects garbage again and again; what was imported is none.
    gc.freeze()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    with open(folder / f'rank{rank}.log', 'w', buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                result = function(rank, *args)
                torch.save(result, folder / f'rank{rank}.pt')
            except BaseException:
                traceback.print_exc()
                log.flush()
                # Not through the interpreter's end, which may wait for the other ranks.
                os._exit(1)
            log.flush()
            os._exit(0)


def train(rank: int, root: Path, arguments: list[str]) -> None:
    """``tools/train.py`` with these arguments."""
    trainings(rank, root, [arguments])


def trainings(rank: int, root: Path, runs: list[list[str]]) -> list[float]:
    """``tools/train.py`` several times over in the same processes; seconds that each took."""
    import importlib.util

    import mmengine._strategy.deepspeed as strategy
    import mmengine.config.config as config

    # Half of a short run's time would go into laying out the config for people.
    config.FormatCode = lambda code, **_: (code, True)
    spec = importlib.util.spec_from_file_location('launcher', root / 'tools' / 'train.py')
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    seconds = []
    for arguments in runs:
        start = time.monotonic()
        sys.argv = ['train.py']
        launcher.main(arguments)
        if '--deepspeed' in arguments:
            # It can be done once a process only.
            strategy.register_deepspeed_optimizers = list
        gc.freeze()
        seconds.append(time.monotonic() - start)
    return seconds
