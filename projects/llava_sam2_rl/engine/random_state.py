"""The state of every random generator that a training step may use: taken, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch


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


class CallBeforeNewBatch:
    """Stands in for a loop's data iterator until the batches already seen are through.

    A resumed loop first runs through the batches it has seen, which draws random numbers; no hook
    runs between that and fetching the next batch.

    Args:
        loop: An ``IterBasedTrainLoop``.
        num_seen: Batches that the loop runs through.
        callback: Called once, before the batch after those is fetched.
    """

    def __init__(self, loop: Any, num_seen: int, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._iterator: Iterator = loop.dataloader_iterator
        self._left = num_seen
        self._callback = callback

    def __iter__(self) -> CallBeforeNewBatch:
        return self

    def __next__(self) -> Any:
        if self._left == 0:
            self._loop.dataloader_iterator = self._iterator
            self._callback()
        self._left -= 1
        return next(self._iterator)
