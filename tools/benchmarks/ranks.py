"""Benchmarks on several ranks of this machine: how they are started, and their DeepSpeed engine."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .common import ROOT

#: How often the ranks are asked whether they have ended, in seconds.
_INTERVAL = 0.1
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
                own = {**environment, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
                with (folder / f'{rank}.log').open('w') as log:
                    started = subprocess.Popen(command, env=own, stdout=log, stderr=log)
                processes.append(started)
            failed = _first_that_fails(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            log_text = (folder / f'{failed}.log').read_text(errors='replace')[-12000:]
            raise RuntimeError(
                f'rank {failed} of {ranks} of {module} ended with exit code '
                f'{processes[failed].returncode}:\n{log_text}'
            )
        return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(ranks)]


def _first_that_fails(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until a rank has failed, or all have ended well: ``None``."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # One that a signal ended has a negative code; the others end because it has gone.
            return min(failed, key=lambda rank: codes[rank] or 0)
        if None not in codes:
            return None
        time.sleep(_INTERVAL)


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
