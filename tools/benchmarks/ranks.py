"""Benchmarks on several ranks of this machine: how they are started, and their DeepSpeed engine."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .common import ROOT

#: How often the ranks are asked whether they have ended, and how long the others have to do so when
#: one has failed, in seconds.
_INTERVAL, _MOMENT = 0.1, 10
#: What `build_engine` needs. A rank imports it first, so that it is no part of what is measured.
_ENGINE = ('mmengine._strategy.deepspeed', 'projects.llava_sam2_rl.engine.deepspeed')


def run_ranks(module: str, ranks: int, options: Mapping[str, Any]) -> list[Any]:
    """What ``on_rank`` of a module returned on each of some ranks, one thread each.

    Args:
        module: Its name; its ``on_rank`` takes ``options`` as a namespace and returns what JSON can
            hold.
        ranks: W. ``OMP_NUM_THREADS`` gives them more threads.
        options: What JSON can hold.

    Raises:
        RuntimeError: A rank failed; the message ends with its log.
    """
    from torch.distributed import TCPStore

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / 'options.json').write_text(json.dumps(dict(options)))
        # As under torchrun they meet at a store of their parent, which outlives each of them.
        store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
        paths = [str(ROOT), str(ROOT / 'tools'), os.environ.get('PYTHONPATH', '')]
        environment = {
            'OMP_NUM_THREADS': '1',
            **os.environ,
            'PYTHONPATH': ':'.join(paths),
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(store.port),
            'TORCHELASTIC_USE_AGENT_STORE': 'True',
            'TORCHELASTIC_RESTART_COUNT': '0',
            'WORLD_SIZE': str(ranks),
        }
        command = [sys.executable, '-m', 'benchmarks.ranks', module, name]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                own = {
                    **environment,
                    'RANK': str(rank),
                    'LOCAL_RANK': str(rank),
                    'TORCHELASTIC_ERROR_FILE': str(folder / f'{rank}.error'),
                }
                with (folder / f'{rank}.log').open('w') as log:
                    started = subprocess.Popen(command, env=own, stdout=log, stderr=log)
                processes.append(started)
            failed = _join(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed:
            # What a signal ended has left no record; else the first to fail has, and the others end
            # because it has gone.
            ended = [rank for rank in failed if processes[rank].returncode < 0]
            records = [rank for rank in range(ranks) if (folder / f'{rank}.error').exists()]
            first = [*ended, *records, *failed][0]
            log_text = (folder / f'{first}.log').read_text(errors='replace')[-12000:]
            raise RuntimeError(
                f'rank {first} of {ranks} of {module} ended with exit code '
                f'{processes[first].returncode}:\n{log_text}'
            )
        return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(ranks)]


def _join(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Waits until all have ended; the ranks that had failed when a failure was first seen.

    The others have a moment left then, in which they find that one has gone.
    """
    deadline, failed = math.inf, list[int]()
    while None in [process.poll() for process in processes] and time.monotonic() < deadline:
        time.sleep(_INTERVAL)
        if not failed:
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            deadline = time.monotonic() + _MOMENT if failed else math.inf
    return failed or [rank for rank, process in enumerate(processes) if process.returncode]


def build_engine(model: Any, stage: int, **zero: Any) -> tuple[Any, Any]:
    """A model under ZeRO as in a run, with AdamW, clipped gradients and a teacher that follows.

    Args:
        model: A `DualLoopModel`; it takes the config of configs/deepspeed/ for its dtype.
        stage: Of ZeRO.
        **zero: Of ``zero_optimization``, in place of the config's.

    Returns:
        A `DualLoopEngine`, and the optimizer's wrapper for its ``train_step``.
    """
    import deepspeed
    import torch
    from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper

    from projects.llava_sam2_rl.engine.deepspeed import DualLoopEngine

    suffix = '' if model.policy.torch_dtype == torch.bfloat16 else '_fp32'
    config = json.loads((ROOT / f'configs/deepspeed/zero{stage}{suffix}.json').read_text())
    config['zero_optimization'].update(zero)
    config.update(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=1.0
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine = DualLoopEngine(model=made)
    engine.after_step.append(model.update_teacher)
    wrapper = DeepSpeedOptimWrapper(optimizer)
    wrapper.model = engine
    return engine, wrapper


def main(module: str, name: str) -> None:
    """What a rank does."""
    import torch.distributed as dist

    from projects.llava_sam2_rl.engine.launch import prepare

    prepare('pytorch', 'a.json')
    for needed in _ENGINE:
        importlib.import_module(needed)
    folder = Path(name)
    options = argparse.Namespace(**json.loads((folder / 'options.json').read_text()))
    found = importlib.import_module(module).on_rank(options)
    (folder / f'{dist.get_rank()}.json').write_text(json.dumps(found))
    # None leaves while another still talks to it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__':
    from projects.llava_sam2_rl.engine.launch import run

    run(lambda: main(*sys.argv[1:]))
