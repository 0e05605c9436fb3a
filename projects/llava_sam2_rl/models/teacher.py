"""The teacher: an exponential moving average (EMA) of the policy's trainable tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from projects.llava_sam2_rl.engine.distributed import full_parameter
from projects.llava_sam2_rl.engine.split_weights import SplitWeights, WholeWeights
from projects.llava_sam2_rl.engine.timing import phase

# Casts of low-precision parameters are made for so many elements at a time, so that an update
# needs 256 MiB of extra memory at most (or one parameter, where a single one is larger).
_ELEMENTS_AT_A_TIME = 2**26
# So many wrong tensors are named in an error; the others are counted.
_SHOWN = 20

#: Module, key in it, full name, parameter.
_Place = tuple[nn.Module, str, str, nn.Parameter]


class EMATeacher:
    """Float32 shadows of exactly the trainable tensors of a model, keyed by parameter name.

    ``shadow <- decay * shadow + (1 - decay) * parameter`` (Tarvainen & Valpola, "Mean teachers
    are better role models", 2017). Float32 because with ``decay`` 0.999 a bfloat16 shadow would
    round every update away. Frozen tensors are the policy's own and are shared. The cost is
    4 bytes per trainable parameter (:attr:`memory_bytes`).

    Deliberately not an ``nn.Module``: it stays out of the model's ``state_dict`` and no
    ``model.to(dtype)`` or mixed-precision wrapper can round it. Shadows live on their parameter's
    device and follow it when they are next used.

    Args:
        model: The policy, not wrapped (no DDP or DeepSpeed engine around it). The shadows start
            as copies of its parameters with ``requires_grad``.
        decay: Share of the old shadow that each update keeps, in [0, 1]. 1 is a teacher that never
            moves.

    Raises:
        ValueError: ``decay`` is outside [0, 1], or the model has no trainable parameter.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f'decay must be between 0 and 1, got {decay}')
        self.decay = decay
        #: Optimizer steps that have moved the teacher.
        self.num_updates = 0
        self._applied = False
        trainable = _trainable(_places(model))
        if not trainable:
            raise ValueError(
                f'{type(model).__name__} has no trainable parameter to average; '
                'unfreeze some before the teacher is made'
            )
        self._shadows: dict[str, Tensor] = {
            name: full_parameter(p).to(torch.float32, copy=True) for name, p in trainable.items()
        }

        self._shapes = {name: tuple(x.shape) for name, x in self._shadows.items()}
        self._weights: Any = WholeWeights()
        self._version = 0
        #: Of whose shadow this rank keeps a part.
        self._split: dict[str, nn.Parameter] = {}

    def use_weights(self, model: nn.Module, weights: WholeWeights) -> None:
        """Keeps this rank's part of the shadows of parameters that lie in parts.

        Args:
            model: The policy.
            weights: What puts its weights together.
        """
        self._weights = weights
        if not isinstance(weights, SplitWeights):
            return
        trained = _trainable(_places(model))
        self._split = {name: p for name, p in trained.items() if weights.is_split(p)}
        for name, p in self._split.items():
            self._shadows[name] = weights.part(p, self._shadows[name])
        self._version = weights.add_version({p: self._shadows[n] for n, p in self._split.items()})

    @property
    def names(self) -> list[str]:
        """Names of the averaged parameters, in the model's order."""
        return list(self._shadows)

    @property
    def num_parameters(self) -> int:
        """Number of averaged scalars, on this rank."""
        return sum(shadow.numel() for shadow in self._shadows.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes the shadows take: 4 per trainable parameter."""
        return 4 * self.num_parameters

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves every shadow towards the model by ``1 - decay``, in float32.

        Raises:
            ValueError: The model's trainable parameters are not the ones averaged here.
            RuntimeError: Called inside :meth:`applied_to`.
        """
        for shadows, sources in self._pairs(model, 'update'):
            torch._foreach_lerp_(shadows, sources, 1.0 - self.decay)
        self.num_updates += 1

    @torch.no_grad()
    def copy_from(self, model: nn.Module) -> None:
        """Makes the teacher equal to the model and starts counting updates anew.

        Raises:
            ValueError, RuntimeError: As in :meth:`update`.
        """
        for shadows, sources in self._pairs(model, 'copy_from'):
            torch._foreach_copy_(shadows, sources)
        self.num_updates = 0

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside the scope, ``model`` computes with the teacher's weights.

        The modules' parameters are exchanged for frozen stand-ins in the parameter's own dtype
        (which share the shadow's memory where that is float32) and put back at the end, also after
        an error. The policy's own parameter objects, their storage, gradients and optimizer state
        are never touched. So a gradient may flow *through* the teacher to its inputs, and
        ``backward`` may run after the scope has ended: the graph holds the teacher's tensors, where
        an exchange of ``parameter.data`` would have it use the policy's, silently. One exception:
        with activation checkpointing the forward is repeated during ``backward``, which then has
        to run inside the scope.

        Raises:
            ValueError: The model's trainable parameters are not the ones averaged here.
            RuntimeError: The teacher is applied already; scopes do not nest.
        """
        self._refuse_while_applied('applied_to')
        with phase('teacher'):
            places = _places(model)
            parameters = self._checked(model, places)
            stand_ins = {
                id(p): nn.Parameter(self._stand_in(name, p), requires_grad=False)
                for name, p in parameters.items()
            }
        for stand_in in stand_ins.values():
            # For whoever would lay a frozen weight elsewhere in memory, for good.
            stand_in.stands_in = True  # type: ignore[attr-defined]
        self._applied = True
        with self._weights.version(self._version):
            try:
                for module, key, _, p in places:
                    module._parameters[key] = stand_ins[id(p)]
                yield model
            finally:
                for module, key, _, p in places:
                    module._parameters[key] = p
                self._applied = False

    def state_dict(self) -> dict[str, Any]:
        """``{'num_updates': int, 'shadows': {name: float32 tensor}}``; the tensors are not copies.

        To be called on every rank where weights lie in parts; those are whole here, on the CPU.
        The decay is not part of it: it belongs to the config, which may change it on resume.
        """
        shadows = dict(self._shadows)
        for name, p in self._split.items():
            shadows[name] = self._weights.whole(p, shadows[name]).cpu()
        return {'num_updates': self.num_updates, 'shadows': shadows}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave; nothing changes where it does not fit.

        Raises:
            ValueError: Names or shapes differ from the model's trainable parameters. The message
                lists them.
            RuntimeError: Called inside :meth:`applied_to`.
        """
        self._refuse_while_applied('load_state_dict')
        shadows = state['shadows']
        _check_same(
            {name: tuple(t.shape) for name, t in shadows.items()},
            self._shapes,
            'teacher state',
        )
        for name, shadow in self._shadows.items():
            value = shadows[name]
            if name in self._split:
                value = self._weights.part(self._split[name], value)
            shadow.copy_(value)
        self.num_updates = int(state['num_updates'])

    def _checked(
        self, model: nn.Module, places: list[_Place] | None = None
    ) -> dict[str, nn.Parameter]:
        parameters = _trainable(_places(model) if places is None else places)
        _check_same(
            {name: tuple(p.shape) for name, p in parameters.items()},
            self._shapes,
            f'the trainable parameters of {type(model).__name__}',
        )
        return parameters

    def _refuse_while_applied(self, what: str) -> None:
        if self._applied:
            raise RuntimeError(
                f'EMATeacher.{what} was called while the teacher is applied to the model; '
                'leave `with teacher.applied_to(model):` first'
            )

    def _shadow(self, name: str, device: torch.device) -> Tensor:
        shadow = self._shadows[name]
        if shadow.device != device:
            shadow = self._shadows[name] = shadow.to(device)
        return shadow

    def _stand_in(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The parameter's value in the teacher, or what stands for it between its uses."""
        if name in self._split:
            return self._weights.stand_in(parameter)
        return self._shadow(name, parameter.device).to(parameter.dtype)

    def _pairs(self, model: nn.Module, what: str) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Shadows and the float32 values of their parameters, a bounded amount at a time."""
        self._refuse_while_applied(what)
        parameters = self._checked(model)
        shadows: list[Tensor] = []
        sources: list[Tensor] = []
        held = 0
        for name, p in parameters.items():
            if held and held + p.numel() > _ELEMENTS_AT_A_TIME:
                yield shadows, sources
                shadows, sources, held = [], [], 0
            shadows.append(self._shadow(name, p.device))
            sources.append(self._weights.precise(p).float())
            held += p.numel()
        yield shadows, sources


def _places(model: nn.Module) -> list[_Place]:
    """Every place a trainable parameter is registered at: tied weights have several.

    One walk over the modules, in the order of ``named_parameters``, which takes twice as long.
    """
    return [
        (module, key, f'{prefix}.{key}' if prefix else key, p)
        for prefix, module in model.named_modules()
        for key, p in module._parameters.items()
        if p is not None and p.requires_grad
    ]


def _trainable(places: list[_Place]) -> dict[str, nn.Parameter]:
    """Each parameter by the first of its names."""
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for _, _, name, p in places:
        first.setdefault(id(p), (name, p))
    return dict(first.values())


def _check_same(
    given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], what: str
) -> None:
    problems = [f'{name} is missing' for name in expected if name not in given]
    problems += [f'{name} is not averaged by the teacher' for name in given if name not in expected]
    problems += [
        f'{name} has shape {given[name]}, the teacher has {expected[name]}'
        for name in expected
        if name in given and given[name] != expected[name]
    ]
    if problems:
        shown = problems[:_SHOWN]
        if len(problems) > _SHOWN:
            shown.append(f'and {len(problems) - _SHOWN} more')
        raise ValueError(
            f'{what}: {len(problems)} tensors do not match the {len(expected)} of the teacher: '
            + '; '.join(shown)
        )
