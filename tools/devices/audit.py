"""What every operation would do on a GPU: devices that do not mix, and what the host waits for."""

from __future__ import annotations

import collections
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .pretend_gpu import DEVICE

ROOT = str(Path(__file__).resolve().parents[2])
aten = torch.ops.aten

_READS = {aten.index.Tensor, aten._unsafe_index.Tensor}
_WRITES = {aten._index_put_impl_.default, aten.index_put_.default, aten.index_put.default}
#: CUDA moves CPU indices itself, and copies between devices are what these are for.
_MAY_MIX = {
    *_READS,
    *_WRITES,
    aten._to_copy.default,
    aten.copy_.default,
    aten._foreach_copy_.default,
    aten.set_.source_Tensor,
    aten.is_same_size.default,
}


def _waits_of_isin(args: tuple, kwargs: dict) -> int:
    elements, tests = args[0], args[1]
    if not (torch.is_tensor(elements) and torch.is_tensor(tests)):
        return 0
    # Above this many candidates PyTorch sorts, and asks `_unique2` for both sides.
    return 2 if tests.numel() >= int(10.0 * elements.numel() ** 0.145) else 0


#: Waits in the host code of CUDA kernels, as read in PyTorch 2.5: how many, from the arguments.
_HIDDEN: dict[Any, Callable[[tuple, dict], int]] = {
    aten.multinomial.default: lambda args, kwargs: 2,  # is_valid.item(), zero_prob.item()
    aten.isin.Tensor_Tensor: _waits_of_isin,
    aten.repeat_interleave.Tensor: lambda args, kwargs: 0 if kwargs.get('output_size') else 1,
    **{
        operation: lambda args, kwargs: 1
        for operation in (
            aten.nonzero.default,
            aten.masked_select.default,
            aten._unique2.default,
            aten.unique_consecutive.default,
            aten.unique_dim.default,
            aten.bincount.default,
            aten.equal.default,
            aten._local_scalar_dense.default,
            aten.lift_fresh.default,  # a list of numbers made a tensor on the GPU
        )
    },
}


class Audit(TorchDispatchMode):
    """Inside the scope, every operation on the pretended GPU is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self._main = threading.main_thread()
        #: Operations on the GPU by phase (`engine.timing`).
        self.operations: collections.Counter = collections.Counter()
        #: Times the host waits, by phase, line of the project, and what for.
        self.waits: collections.Counter = collections.Counter()
        #: What a GPU would refuse, by line of the project.
        self.problems: collections.Counter = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        self._look_for_problems(func, args, given)
        out = func(*args, **kwargs)
        made = _tensors(out)
        if not any(map(on_gpu, [*given, *made])):
            return out
        generator = kwargs.get('generator')
        if generator is not None and generator.device.type != DEVICE:
            self._problem(f'{func}: a {generator.device} generator for a tensor on the GPU')
        phase = self._phase()
        self.operations[phase] += 1
        for what, count in _waits(func, args, kwargs, made):
            self.waits[phase, self._where(), what] += count
        return out

    def by_phase(self) -> dict[str, int]:
        """Waits in each phase."""
        found: collections.Counter = collections.Counter()
        for (phase, *_), count in self.waits.items():
            found[phase] += count
        return dict(found)

    def _look_for_problems(self, func: Any, args: tuple, given: list[torch.Tensor]) -> None:
        # A CPU tensor without dimensions is a number to pointwise operations, to them alone.
        takes_numbers = torch.Tag.pointwise in func.tags or '_foreach' in str(func)
        gpu = any(map(on_gpu, given))
        cpu = any(not on_gpu(x) and (x.dim() > 0 or not takes_numbers) for x in given)
        if gpu and cpu and func not in _MAY_MIX:
            shapes = ', '.join(f'{x.device.type}{tuple(x.shape)}' for x in given)
            self._problem(f'{func}: mixed devices {shapes}')
        if gpu and func in _READS | _WRITES:
            if not on_gpu(args[0]):
                self._problem(f'{func}: a CPU tensor indexed by, or filled from, the GPU')
            elif func in _WRITES and args[2].dim() > 0 and not on_gpu(args[2]):
                self._problem(f'{func}: values on the CPU{tuple(args[2].shape)}')

    def _problem(self, what: str) -> None:
        self.problems[self._where(), what] += 1

    def _phase(self) -> str:
        if threading.current_thread() is not self._main:
            return 'backward'
        module = sys.modules.get('projects.llava_sam2_rl.engine.timing')
        return (module and module.phases.current) or 'other'

    def _where(self) -> str:
        """The innermost line of the project, and of a library where that is further in."""
        frame, library = sys._getframe(1), None
        while frame is not None:
            name = frame.f_code.co_filename
            if name != __file__ and name.startswith(ROOT) and '/site-packages/' not in name:
                own = f'{name.removeprefix(ROOT + "/")}:{frame.f_lineno}'
                return own if library is None else f'{own} via {library}'
            if library is None and '/site-packages/' in name and '/torch/' not in name:
                library = f'{name.split("site-packages/")[1]}:{frame.f_lineno}'
            frame = frame.f_back
        if threading.current_thread() is not self._main:
            return 'autograd engine'
        return library or 'unknown'


def on_gpu(x: Any) -> bool:
    """Whether ``x`` is a tensor on the pretended GPU."""
    return torch.is_tensor(x) and x.device.type == DEVICE


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if torch.is_tensor(x)]


def _waits(func: Any, args: tuple, kwargs: dict, made: list) -> Iterator[tuple[str, int]]:
    """What of an operation the host waits for, and how often."""
    if func in (aten._to_copy.default, aten.copy_.default):
        source = args[1] if func is aten.copy_.default else args[0]
        target = args[0] if func is aten.copy_.default else made[0]
        if on_gpu(source) and not on_gpu(target):
            yield 'copy device to host', 1
        elif on_gpu(target) and not on_gpu(source):
            # From pageable memory CUDA copies by way of a buffer of its own.
            asynchronous = kwargs.get('non_blocking') or (
                func is aten.copy_.default and len(args) > 2 and args[2]
            )
            if not (asynchronous and source.is_pinned()):
                yield 'copy host to device', 1
    elif func in _READS | _WRITES:
        indices = [i for i in args[1] if i is not None]
        if func in _WRITES and len(indices) == 1 and indices[0].dtype == torch.bool:
            accumulates = args[3] if len(args) > 3 else kwargs.get('accumulate', False)
            if args[2].numel() == 1 and not accumulates:
                return  # becomes masked_fill
        for i in indices:
            if on_gpu(i) and i.dtype in (torch.bool, torch.uint8):
                yield 'boolean index (nonzero)', 1
            elif on_gpu(args[0]) and not on_gpu(i):
                yield 'indices on the CPU, copied to the device', 1
    elif func in _HIDDEN and (count := _HIDDEN[func](args, kwargs)):
        yield str(func).removeprefix('aten.').removesuffix('.default'), count
