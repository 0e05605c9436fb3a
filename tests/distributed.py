"""Real processes that talk to each other, for tests.

They come from multiprocessing's fork server, which has imported everything once: a rank starts in
a fraction of a second instead of ten.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

#: So long a test waits for another process before it gives up: a bound for a machine that is busy
#: with much else, not a duration that anything is expected to take.
PATIENCE = 600

_PRELOAD = [
    'projects.llava_sam2_rl.models',
    'projects.llava_sam2_rl.hooks',
    'projects.llava_sam2_rl.engine.entry',
    'deepspeed',
]


def run_ranks(
    function: Callable[..., Any], ranks: int, folder: Path, *args: Any, timeout: float = PATIENCE
) -> list[Any]:
    """What ``function(rank, *args)`` returned on each rank.

    Raises:
        RuntimeError: A rank failed; the message holds the tracebacks.
        TimeoutError: A rank was not done in time.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(_PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    store, environment = meeting_point()
    processes = [
        context.Process(target=_rank, args=(function, rank, ranks, environment, folder, args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    hanging = join(processes, timeout)
    del store
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


def join(processes: list[Any], timeout: float = PATIENCE) -> list[int]:
    """Waits until all have ended, and kills the others; indices of those."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    return hanging


def wait_until(
    condition: Callable[[], Any], explain: Callable[[], Any] = str, timeout: float = PATIENCE
) -> Any:
    """The first true value of ``condition()``.

    Raises:
        TimeoutError: There was none in time; the message is ``explain()``.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f'waited for {timeout} s: {explain()}')
        time.sleep(0.05)
    return value


def meeting_point() -> tuple[TCPStore, dict[str, str]]:
    """A store by which ranks find each other, and the environment that leads them to it.

    As under torchrun the store is the parent's, which has got its port from the system. A port
    that was looked for may be taken again when rank 0 comes to listen on it.
    """
    store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    return store, {
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(store.port),
        'TORCHELASTIC_USE_AGENT_STORE': 'True',
        'TORCHELASTIC_RESTART_COUNT': '0',
    }


def free_port() -> int:
    """A port for a program that has to be told one.

    It lies below those that the system gives to whoever asks for any, so nobody gets it by chance
    between now and then.
    """
    ephemeral = int(Path('/proc/sys/net/ipv4/ip_local_port_range').read_text().split()[0])
    # Not by the seeded generator, which draws the same ports in every test process.
    for port in random.SystemRandom().sample(range(10_000, max(20_000, ephemeral)), 100):
        with socket.socket() as probe:
            try:
                probe.bind(('', port))
            except OSError:
                continue
            return port
    raise RuntimeError('none of 100 ports is free')


def _rank(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    environment: dict[str, str],
    folder: Path,
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    # DeepSpeed collects garbage again and again; what was imported is none.
    gc.freeze()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        **environment,
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
        launcher.main(arguments)
        if '--deepspeed' in arguments:
            # It can be done once a process only.
            strategy.register_deepspeed_optimizers = list
        gc.freeze()
        seconds.append(time.monotonic() - start)
    return seconds
