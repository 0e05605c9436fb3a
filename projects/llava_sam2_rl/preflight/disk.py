"""Whether the work directory can be written and holds the checkpoints that will be kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mmengine.config import Config

from projects.llava_sam2_rl.preflight.memory import FLOAT, Sizes
from projects.llava_sam2_rl.preflight.problems import Problem


def check_disk(cfg: Config, sizes: Sizes | None, stage: str) -> list[Problem]:
    """The work directory's disk against checkpoints kept, and the one that is being written.

    Args:
        cfg: Config of a run.
        sizes: From `read_sizes`; None where the model cannot be built. Then only the right to
            write is looked at.
        stage: ``'train'`` or ``'test'``; a test writes no checkpoints.
    """
    work_dir = Path(cfg.get('work_dir') or './work_dirs')
    there = work_dir.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = 'is not a folder' if not there.is_dir() else 'may not be written to'
        return [Problem('work_dir', f'{there} {what}', '--work-dir FOLDER')]
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if stage != 'train' or sizes is None or not hook:
        return []
    size = checkpoint_bytes(sizes, save_optimizer=hook.get('save_optimizer', True))
    keep = hook.get('max_keep_ckpts', -1)
    # The oldest is removed when the newest is whole; what an earlier part of the run left is there
    # already.
    written = sum(1 for _ in work_dir.glob('iter_*.pth')) if cfg.get('resume') else 0
    count = 1 if keep <= 0 else max(1, keep + 1 - written)
    free = shutil.disk_usage(there).free
    if free >= count * size:
        return []
    fit = int(free // size)
    options = ['--work-dir on another disk']
    if fit >= 2 and keep > 1:
        options.append(f'--cfg-options default_hooks.checkpoint.max_keep_ckpts={fit - 1}')
    return [
        Problem(
            'default_hooks.checkpoint.max_keep_ckpts' if fit else 'work_dir',
            f'{count} checkpoint(s) of about {size / 1e9:.2f} GB are written to {work_dir}, whose '
            f'disk has {free / 1e9:.2f} GB free',
            ', or '.join(options),
        )
    ]


def checkpoint_bytes(sizes: Sizes, save_optimizer: bool = True) -> int:
    """Size of a checkpoint: trained weights and their teacher, and both moments of AdamW.

    Frozen weights are not in it. Weights under autocast and the teacher are float32.
    """
    return FLOAT * sizes.trained * (4 if save_optimizer else 2)
