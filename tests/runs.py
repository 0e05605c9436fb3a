"""Reading what a training run left behind, and comparing two of them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

#: Logged values that depend on the machine's speed, not on the training.
TIMES = ('time', 'data_time', 'step_time', 'memory')


def skip_without_xtuner(module: str = 'xtuner.tools.train') -> Any:
    """A module of xtuner; the test is skipped where it cannot be imported (transformers 5)."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f'xtuner cannot be imported here: {error}')


#: For programs that a test starts: one thread each, no GPU.
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}


def run_on_two_ranks(program: Path, *arguments: Any, cwd: Path) -> None:
    """Runs a program of this project under torchrun, at a port that is free."""
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    done = subprocess.run(
        [*start, program, *arguments, '--launcher', 'pytorch'],
        cwd=cwd,
        env=ENV,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def rows(work_dir: Path, having: str) -> dict[int, dict[str, float]]:
    """Logged rows with the key ``having`` by step, the latest entry of each, without times."""
    found = {}
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if having in row:
                found[row['step']] = {
                    k: v for k, v in row.items() if k not in TIMES and not k.startswith('time/')
                }
    return found


def training(work_dir: Path) -> dict[int, dict[str, float]]:
    """What was logged of each training step."""
    return rows(work_dir, 'loss')


def evaluation(work_dir: Path) -> dict[int, dict[str, float]]:
    """What was logged of each evaluation."""
    return rows(work_dir, 'cycle/return_iou')


def load(path: Path) -> dict[str, Any]:
    """A checkpoint, read whole."""
    return torch.load(path, map_location='cpu', weights_only=False)


def newest(work_dir: Path) -> Path | None:
    """What ``last_checkpoint`` names."""
    last = work_dir / 'last_checkpoint'
    return Path(last.read_text()) if last.exists() else None


def assert_same_checkpoint(
    a: Path,
    b: Path,
    parts: tuple[str, ...] = ('state_dict', 'teacher', 'optimizer', 'random_states'),
) -> None:
    """Weights, teacher, optimizer and random states are equal, bit for bit."""
    first, second = load(a), load(b)
    assert first['meta']['iter'] == second['meta']['iter']
    for part in parts:
        assert_same(first[part], second[part], part)


def assert_same(a: Any, b: Any, where: str) -> None:
    """Nested values are equal, tensors bit for bit; ``where`` names them in errors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{where}/{i}')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where
