"""How the parts of the network are made, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def parts_of(dtype: torch.dtype) -> Iterator[None]:
    """Inside the scope, modules are built in ``dtype``, on the meta device too."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    on_meta = torch.empty(0).is_meta
    try:
        with _SchedulesOnCPU() if on_meta else nullcontext():
            yield
    finally:
        torch.set_default_dtype(default_dtype)


class _SchedulesOnCPU(TorchFunctionMode):
    """Lets SAM 2 be built on the meta device.

    It reads its stochastic-depth schedule with ``torch.linspace(...).item()``, which has no value
    there.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs['device'] = 'cpu'
        return func(*args, **kwargs)


def build_text_hidden_fcs(llm_width: int, prompt_width: int) -> nn.Sequential:
    """``text_hidden_fcs``: from the hidden state of a ``[SEG]`` to a prompt for SAM 2."""
    return nn.Sequential(
        nn.Linear(llm_width, llm_width),
        nn.ReLU(inplace=True),
        nn.Linear(llm_width, prompt_width),
        nn.Dropout(0.0),
    )


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of its first parameter."""
    return next(module.parameters()).dtype
