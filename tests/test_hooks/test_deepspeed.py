"""How a run under ZeRO-3 with weights in parts decides to decode."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import run_ranks
from mmengine.config import Config
from test_engine.test_distributed import ROOT
from test_engine.test_split_weights import split

from projects.llava_sam2_rl.engine.launch import prepare
from projects.llava_sam2_rl.hooks import deepspeed


def choices(rank: int, memory: dict[str, list[float]]) -> dict[str, Any]:
    """What ranks choose with so many bytes each, and what one asks for itself."""
    prepare('pytorch', 'a.json')
    dual_loop, wrapped, *_ = split('sft')
    lines: list[str] = []
    logger = logging.getLogger('choices')
    logger.setLevel(logging.INFO)
    logger.addHandler(SimpleNamespace(level=0, handle=lambda x: lines.append(x.getMessage())))
    config = Config.fromfile(ROOT / 'configs/sa2va_tiny_dual_loop.py')
    runner = SimpleNamespace(model=wrapped, cfg=config, logger=logger)
    found: dict[str, Any] = {}
    for name, of_ranks in memory.items():
        deepspeed.memory_of_a_rank = lambda size=of_ranks[rank]: size
        for given in (None, True, False):
            dual_loop.gather_for_rollout = given
            deepspeed.choose_way_to_decode(runner)
            found[f'{name}, {given}'] = dual_loop.gather_for_rollout
    return {**found, 'lines': lines}


@pytest.mark.slow
def test_all_ranks_choose_by_the_smallest_gpu(tmp_path):
    memory = {'room': [80e9, 24e9], 'none on rank 1': [80e9, 3e9]}
    for found in run_ranks(choices, 2, tmp_path, memory):
        first, second = found.pop('lines')
        assert 'gather_for_rollout=True' in first
        assert 'of 21.0 GB' in first
        assert 'stays in parts (gather_for_rollout=False)' in second
        assert found == {
            'room, None': True,
            'room, True': True,
            'room, False': False,
            'none on rank 1, None': False,
            'none on rank 1, True': True,
            'none on rank 1, False': False,
        }


def test_without_a_gpu_it_is_a_share_of_the_machines_memory(monkeypatch):
    monkeypatch.setattr(deepspeed.torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(
        deepspeed.psutil, 'virtual_memory', lambda: SimpleNamespace(total=64_000_000_000)
    )
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert deepspeed.memory_of_a_rank() == 16_000_000_000
