"""Scopes around modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Turns dropout off inside the scope."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
