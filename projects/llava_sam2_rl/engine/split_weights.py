"""Weights of which each rank keeps a part, put together where they are used.

DeepSpeed gathers a layer's weights when its ranks run that layer, and takes it that all of them do.
Ranks of this model do not: their captions differ in length, a record has no caption, groups are
sampled again. Here ranks agree on what they gather. A rank that needs a unit (a layer, an
embedding, a head) says so; one that has nothing to ask for any more, since it has come to the next
exchange between ranks, says that. All gather what the first rank that still asks has asked for,
whoever needs it, until all have come to the exchange; the first is the lowest of those that are
furthest behind. So every rank gathers the same units in the same order, whatever each of them
computes, and none waits for one that does not come: without a caption, in the middle of a decoding
or of a backward pass, in an objective that knows nothing of this. Ranks that compute the same, as
they mostly do, ask for the same and gather once; one that has written its captions before another
waits for it at the teacher's pass and makes that with it.

A unit lies whole from its use until the next one is asked for. What autograd keeps of it for the
backward pass is kept as a note of where it is to be found, and gathered again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from projects.llava_sam2_rl.engine.distributed import full_parameter

#: Torch 2.13 renames it.
_all_gather: Any = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor

#: Said by a rank that has come to the next exchange.
_ARRIVED = -1
#: More sets of weights than there are: the trained ones, the teacher's, those of the reference.
_MAX_VERSIONS = 8


class WholeWeights:
    """Weights that lie whole on every rank: nothing is to be done about them."""

    def together(self) -> None:
        """To be called on every rank before any other exchange between ranks, once the rank has
        computed what it has to; returns when all have."""

    def of(self, module: nn.Module) -> AbstractContextManager[None]:
        """Inside the scope the weights of a module, those of its parts included, lie whole.

        Needed where a weight is used by itself: modules that are called see to their own.
        """
        return nullcontext()

    def saved_for_backward(self) -> AbstractContextManager[Any]:
        """The scope of a forward pass whose graph is to hold no gathered weights."""
        return nullcontext()

    def version(self, number: int) -> AbstractContextManager[None]:
        """Inside the scope modules compute with the parameters of `SplitWeights.add_version`."""
        return nullcontext()

    def is_split(self, parameter: Tensor) -> bool:
        """Whether this rank keeps only a part of it."""
        return False

    def precise(self, parameter: nn.Parameter) -> Tensor:
        """The trained parameter as precisely as it is known, or this rank's part of it, flat."""
        return full_parameter(parameter)


@dataclass(frozen=True, eq=False)
class _Slot:
    """A parameter of which each rank has a part."""

    parameter: Any
    shape: torch.Size
    dtype: torch.dtype
    #: Modules and the keys under which they have it: tied weights have several.
    places: list[tuple[nn.Module, str]]
    #: What stands for it between its uses: it has the shape, which much is read of, and nobody
    #: computes with it unnoticed.
    nothing: Tensor
    #: This rank's parts of other versions than the trained one.
    others: dict[int, Tensor]

    def part(self, version: int) -> Tensor:
        """This rank's part: flat, of the same length on all ranks, 0 behind the end."""
        return self.others.get(version, self.parameter.ds_tensor)

    def put(self, value: Tensor) -> None:
        """Gives what stands in the places a value."""
        module, key = self.places[0]
        module._parameters[key].data = value  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Note:
    """Where a tensor that autograd wanted to keep is found again."""

    wish: int
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class SplitWeights(WholeWeights):
    """Weights of a ZeRO-3 engine that are above its persistence thresholds.

    To be made on every rank at once.

    Args:
        module: In the engine; its parameters are DeepSpeed's, in parts, and are taken over.
        device: Where they are put together.
        precise_part: Gives this rank's part of a trained parameter's float32 master.
    """

    module: nn.Module
    device: torch.device
    precise_part: Callable[[nn.Parameter], Tensor]
    #: Called with unit and version of every gather, which all ranks make in the same order.
    watchers: list[Callable[[int, int], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ranks, self._rank = dist.get_world_size(), dist.get_rank()
        # Ranks agree on the host, which on a GPU runs ahead of what it has asked for.
        self._talk = dist.new_group(backend='gloo')
        self._slots: dict[Tensor, _Slot] = {}
        self._unit_of: dict[nn.Parameter, int] = {}
        self._units: list[list[_Slot]] = []
        self._version, self._num_versions = 0, 1
        #: How often the version has changed since the last exchange.
        self._stage = 0
        #: Units of which there are several versions.
        self._trained: set[int] = set()
        #: Units that lie whole, by `_wish`.
        self._whole: dict[int, list[Tensor]] = {}
        #: The memory of these: which unit, and which of its tensors.
        self._memory: dict[int, tuple[int, int]] = {}
        #: How many calls and scopes use a unit just now.
        self._in_use: Counter[int] = Counter()
        self._seen: set[nn.Module] = set()
        self._find(self.module, None)
        for slots in self._units:
            for slot in slots:
                self._take_apart(slot)

    # ------------------------------------------------------------------ for models

    def together(self) -> None:
        """See `WholeWeights`; afterwards nothing that is not in use lies whole."""
        self._ask(_ARRIVED)
        self._release()
        self._stage = 0

    @contextmanager
    def of(self, module: nn.Module) -> Iterator[None]:
        """See `WholeWeights`."""
        units = self._units_in(module)
        self._use(units)
        try:
            yield
        finally:
            self._in_use.subtract(units)

    def saved_for_backward(self) -> AbstractContextManager[Any]:
        """See `WholeWeights`."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, self._tensor_of)

    @contextmanager
    def version(self, number: int) -> Iterator[None]:
        """See `WholeWeights`. To be entered and left while the parameters stand in their places."""
        before = self._version
        self._drop_trained()
        self._version = number
        self._stage += 1
        try:
            yield
        finally:
            self._drop_trained()
            self._version = before
            self._stage += 1

    # ------------------------------------------------------- for who keeps weights too

    def is_split(self, parameter: Tensor) -> bool:
        """See `WholeWeights`."""
        return parameter in self._slots

    def precise(self, parameter: nn.Parameter) -> Tensor:
        """See `WholeWeights`."""
        if parameter not in self._slots:
            return full_parameter(parameter)
        return self.precise_part(parameter).to(self.device)

    def part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a whole value of a split parameter; a copy, see `_Slot.part`."""
        length = len(self._slots[parameter].part(0))
        found = torch.zeros(length, dtype=value.dtype, device=self.device)
        own = value.flatten()[length * self._rank : length * (self._rank + 1)]
        found[: len(own)] = own.to(self.device)
        return found

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """Undoes `part`; to be called on every rank, at an exchange."""
        slot = self._slots[parameter]
        found = part.new_empty(self._ranks * len(part))
        _all_gather(found, part.contiguous())
        return found[: slot.shape.numel()].view(slot.shape)

    def load(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets a split parameter to a whole value, but for its float32 master."""
        self._slots[parameter].part(0).data.copy_(self.part(parameter, value))

    def stand_in(self, parameter: nn.Parameter) -> Tensor:
        """What stands for the values of a split parameter between its uses: NaN of its shape."""
        return self._slots[parameter].nothing

    def add_version(self, parts: Mapping[nn.Parameter, Tensor]) -> int:
        """Adds other values of all trained parameters that are split.

        Args:
            parts: This rank's parts, which may change later, but not be replaced.

        Returns:
            The number for `version`.
        """
        number = self._num_versions
        if number >= _MAX_VERSIONS:
            raise ValueError(f'there are {_MAX_VERSIONS} sets of weights already')
        self._num_versions += 1
        for parameter, part in parts.items():
            self._slots[parameter].others[number] = part
            self._trained.add(self._unit_of[parameter])
        return number

    # ---------------------------------------------------------------------- modules

    def _find(self, module: nn.Module, unit: int | None) -> None:
        """Makes units: a layer of a list of layers with all that is in it, or what a module has
        itself. Calls of modules see to their units."""
        if module in self._seen:
            return
        self._seen.add(module)
        if unit is None and isinstance(module, nn.ModuleList):
            for layer in module:
                if isinstance(layer, nn.ModuleList | nn.ModuleDict):  # is not called itself
                    self._find(layer, None)
                    continue
                self._units.append([])
                self._find(layer, len(self._units) - 1)
                self._watch(layer, self._units_in(layer))
            return
        own = [(key, p) for key, p in module._parameters.items() if p is not None]
        own = [(key, p) for key, p in own if not p.ds_persist]  # type: ignore[attr-defined]
        if own and unit is None:
            self._units.append([])
        for key, parameter in own:
            if parameter in self._slots:  # tied
                self._slots[parameter].places.append((module, key))
                continue
            shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
            part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
            rest = self._ranks * part.numel() - shape.numel()
            if part.dtype != parameter.dtype or not 0 <= rest < self._ranks:
                raise ValueError(
                    'the DeepSpeed config keeps parts of weights quantized, on NVMe or in groups '
                    'of ranks, which cannot be put together here: leave zero_quantized_*, mics_* '
                    'and offload_param.device=nvme out of zero_optimization'
                )
            nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=self.device)
            places = [(module, key)]
            slot = _Slot(parameter, shape, parameter.dtype, places, nothing.expand(shape), {})
            self._slots[parameter] = slot
            self._unit_of[parameter] = len(self._units) - 1 if unit is None else unit
            self._units[self._unit_of[parameter]].append(slot)
        if own and unit is None:
            self._watch(module, sorted({self._unit_of[p] for _, p in own}))
        for child in module.children():
            self._find(child, unit)

    def _watch(self, module: nn.Module, units: list[int]) -> None:
        if not units:
            return

        def before(*_: Any) -> None:
            self._use(units)

        def after(*_: Any) -> None:
            self._in_use.subtract(units)

        module.register_forward_pre_hook(before)
        # Also where the call ends with an error, as checkpointing's does on purpose.
        module.register_forward_hook(after, always_call=True)

    def _units_in(self, module: nn.Module) -> list[int]:
        return sorted({self._unit_of[p] for p in module.parameters() if p in self._unit_of})

    def _take_apart(self, slot: _Slot) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        slot.parameter.data = slot.nothing
        # DeepSpeed would gather it by itself, in a forward pass of its engine.
        slot.parameter.ds_status = ZeroParamStatus.AVAILABLE

    # ---------------------------------------------------------------------- gathers

    def _wish(self, unit: int) -> int:
        """The number of a unit's weights as this rank wants them."""
        return unit * _MAX_VERSIONS + (self._version if unit in self._trained else 0)

    def _use(self, units: Sequence[int]) -> None:
        self._in_use.update(units)
        for unit in units:
            self._have(self._wish(unit))

    def _have(self, wish: int) -> list[Tensor]:
        """The tensors of a unit, gathered where they do not lie whole."""
        if wish not in self._whole:
            self._release()
            with torch.no_grad():
                found = self._ask(wish)
            assert found is not None
            unit = wish // _MAX_VERSIONS
            self._whole[wish] = found
            for index, (slot, tensor) in enumerate(zip(self._units[unit], found, strict=True)):
                self._memory[tensor.untyped_storage().data_ptr()] = wish, index
                if wish == self._wish(unit):
                    slot.put(tensor)
        return self._whole[wish]

    def _release(self) -> None:
        for wish in list(self._whole):
            if self._in_use[wish // _MAX_VERSIONS] <= 0:
                self._drop(wish)

    def _drop_trained(self) -> None:
        for wish in list(self._whole):
            if wish // _MAX_VERSIONS in self._trained:
                self._drop(wish)

    def _drop(self, wish: int) -> None:
        unit = wish // _MAX_VERSIONS
        slots = zip(self._units[unit], self._whole.pop(wish), strict=True)
        for slot, tensor in slots:
            self._memory.pop(tensor.untyped_storage().data_ptr(), None)
            if wish == self._wish(unit):
                slot.put(slot.nothing)

    def _ask(self, wish: int) -> list[Tensor] | None:
        """Takes part in gathers until this rank has its own, or all have come to the exchange."""
        own = torch.tensor([[self._stage, wish]])
        said = torch.empty(self._ranks, 2, dtype=own.dtype)
        while True:
            _all_gather(said, own, group=self._talk)
            asking = [(stage, n, x) for n, (stage, x) in enumerate(said.tolist()) if x != _ARRIVED]
            if not asking:
                return None
            *_, chosen = min(asking)
            found = self._gather(chosen, chosen == wish)
            if found is not None:
                return found

    @torch.no_grad()
    def _gather(self, wish: int, keep: bool) -> list[Tensor] | None:
        unit, version = divmod(wish, _MAX_VERSIONS)
        for watcher in self.watchers:
            watcher(unit, version)
        found = []
        for slot in self._units[unit]:
            part = slot.part(version).to(self.device, slot.dtype)
            # Each in memory of its own, by which it is known, and straight into it.
            whole = part.new_empty(self._ranks * len(part))
            _all_gather(whole, part)
            found.append(whole[: slot.shape.numel()].view(slot.shape))
        return found if keep else None

    # ---------------------------------------------------------------------- autograd

    def _note(self, tensor: Tensor) -> Tensor | _Note:
        place = self._memory.get(tensor.untyped_storage().data_ptr())
        if place is None:
            return tensor
        return _Note(*place, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _tensor_of(self, kept: Tensor | _Note) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor = self._have(kept.wish)[kept.index]
        return tensor.as_strided(kept.size, kept.stride, kept.offset)
