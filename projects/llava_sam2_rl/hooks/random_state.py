"""Taking and putting back the state of every random generator a training step may use."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import set_random_seed

from projects.llava_sam2_rl.registry import HOOKS


def get_random_state() -> dict[str, Any]:
    """State of the generators of Python, numpy, torch, and torch on this process's CUDA device.

    Returns:
        Nested dicts, lists, tensors, numbers and ``None`` only, so that a checkpoint that holds it
        loads with ``weights_only=True``.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    return {
        'python': {'version': version, 'words': list(words), 'gauss': gauss},
        'numpy': {
            'name': name,
            'keys': torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            'position': int(position),
            'has_gauss': int(has_gauss),
            'cached_gaussian': float(cached_gaussian),
        },
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`get_random_state` took.

    A CUDA state is left out on a machine without CUDA, and the other way round.
    """
    python, numpy = state['python'], state['numpy']
    random.setstate((python['version'], tuple(python['words']), python['gauss']))
    np.random.set_state(
        (
            numpy['name'],
            numpy['keys'].cpu().numpy().astype(np.uint32),
            numpy['position'],
            numpy['has_gauss'],
            numpy['cached_gaussian'],
        )
    )
    # Checkpoints are loaded onto the training device; generator states live on the CPU.
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


@HOOKS.register_module()
class RankSeedHook(Hook):
    """Gives every rank random numbers of its own once the model is built.

    mmengine seeds all ranks alike, which building the model needs (LoRA matrices, the reference).
    Sampling needs the contrary, or all ranks would draw their rollouts by the same numbers. Rank 0
    stays as it is. On resume the states of the checkpoint take the place of this seed.
    """

    def before_train(self, runner: Any) -> None:
        """Seeds all ranks but the first."""
        if get_rank() > 0:
            set_random_seed((runner.seed + 1_000_003 * get_rank()) % 2**32)
