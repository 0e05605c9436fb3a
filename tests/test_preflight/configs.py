"""Configs of runs as files, as a user writes them."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config

from projects.llava_sam2_rl.engine.entry import parse_options

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / 'configs/sa2va_tiny_dual_loop.py'
BIG = ROOT / 'configs/sa2va_4b_dual_loop.py'


def config(*options: str, file: Path = TINY) -> Config:
    """A config with ``--cfg-options``."""
    cfg = Config.fromfile(file)
    cfg.merge_from_dict(parse_options(options))
    return cfg


def by_key(problems) -> dict[str, str]:
    """Message and fix of each problem by its key."""
    return {problem.key: f'{problem.message} -> {problem.fix}' for problem in problems}
