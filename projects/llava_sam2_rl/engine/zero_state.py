"""Weights and optimizer states of a ZeRO engine, whole and by name.

ZeRO keeps float32 masters and optimizer states in flat buffers, of which each rank has a share. A
checkpoint holds them by parameter name, so that any number of ranks and any stage can go on from
it. All of it is exact: values are copied, not computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor, nn

from projects.llava_sam2_rl.engine.distributed import full_parameter
from projects.llava_sam2_rl.engine.split_weights import SplitWeights, WholeWeights
from projects.llava_sam2_rl.utils.errors import CheckpointError


def full_weights(module: nn.Module, *, keep: bool) -> OrderedDict[str, Tensor]:
    """The trained weights in float32 on the CPU; to be called on every rank.

    Args:
        module: In the engine.
        keep: Whether this rank wants them; empty where not.
    """
    found: OrderedDict[str, Tensor] = OrderedDict()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            whole = full_parameter(parameter)
            if keep:
                found[name] = whole.to('cpu', torch.float32, copy=True)
    return found


@torch.no_grad()
def load_weights(
    engine: Any, weights: Mapping[str, Tensor], split: WholeWeights | None = None
) -> None:
    """Puts weights into parameters and float32 masters; names that are no parameters are left out.

    To be called on every rank.

    Args:
        engine: Under ZeRO.
        weights: Whole, by name.
        split: Has those of which each rank keeps a part. Defaults to None: there are none.
    """
    parameters = dict(engine.module.named_parameters())
    changed = []
    for name, value in weights.items():
        parameter = parameters.get(name.removeprefix('module.'))
        if parameter is None:
            continue
        if parameter.requires_grad:
            _set_full(engine, parameter, value.float(), None)
        if isinstance(split, SplitWeights) and split.is_split(parameter):
            split.load(parameter, value)
            continue
        parameter.data.copy_(value)
        changed.append(parameter)
    if engine.zero_optimization_stage() == 3:
        for parameter in changed:
            parameter.partition(has_been_updated=True)
        gather_parameters(changed)


def gather_parameters(parameters: Iterable[Any]) -> None:
    """Puts parameters that ZeRO-3 took apart together; to be called on every rank.

    One by one. DeepSpeed starts the gathers of a list at once and waits for the last alone, which
    is enough on one CUDA stream; gloo's threads may then still be writing the others.

    Args:
        parameters: Those to which DeepSpeed has given methods of its own.
    """
    for parameter in parameters:
        parameter.all_gather([parameter])


@torch.no_grad()
def optimizer_state(engine: Any, *, keep: bool) -> dict[str, Any]:
    """The optimizer's state by parameter name, on the CPU; to be called on every rank.

    Args:
        engine: Under ZeRO-1, -2 or -3.
        keep: Whether this rank wants it.

    Returns:
        ``{'state': {name: {key: tensor}}, 'param_groups': [options]}``.
    """
    names = {id(p): name for name, p in engine.module.named_parameters()}
    optimizer = engine.optimizer.optimizer
    state: dict[str, dict[str, Any]] = {}
    if optimizer.state:
        _link_slices(engine)
    for flat, parameters in _flat_groups(engine):
        held = optimizer.state.get(flat, {})
        for parameter in parameters:
            found = {}
            for key, value in held.items():
                whole = isinstance(value, Tensor) and value.shape == flat.shape
                if whole:
                    value = safe_get_full_optimizer_state(parameter, key).view(_shape(parameter))
                if keep:
                    found[key] = value.detach().cpu().clone() if torch.is_tensor(value) else value
            if keep and found:
                state[names[id(parameter)]] = found
    groups = [
        {key: value for key, value in group.items() if key != 'params'}
        for group in optimizer.param_groups
    ]
    return {'state': state, 'param_groups': groups}


@torch.no_grad()
def load_optimizer_state(engine: Any, saved: Mapping[str, Any]) -> None:
    """Undoes `optimizer_state`, on any number of ranks and under any stage.

    Raises:
        CheckpointError: The optimizer has other groups, or the state lacks a parameter.
    """
    optimizer = engine.optimizer.optimizer
    if len(saved['param_groups']) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved['param_groups'])} parameter groups, the "
            f"config's has {len(optimizer.param_groups)}: resume with the config that wrote it"
        )
    for group, options in zip(optimizer.param_groups, saved['param_groups'], strict=True):
        group.update(options)
    state = saved['state']
    if not state:  # no step had been taken
        return
    names = {id(p): name for name, p in engine.module.named_parameters()}
    groups = list(_flat_groups(engine))
    missing = [names[id(p)] for _, ps in groups for p in ps if names[id(p)] not in state]
    if missing:
        raise CheckpointError(
            f"the checkpoint's optimizer has no state of {len(missing)} parameters "
            f'({missing[0]}, …): resume with the config that wrote it'
        )
    for flat, parameters in groups:
        first = state[names[id(parameters[0])]]
        shape = _shape(parameters[0])
        optimizer.state[flat] = {
            key: torch.zeros_like(flat) if _covers(value, shape) else _copied(value)
            for key, value in first.items()
        }
    _link_slices(engine)
    for _, parameters in groups:
        for parameter in parameters:
            for key, value in state[names[id(parameter)]].items():
                if _covers(value, _shape(parameter)):
                    _set_full(engine, parameter, value, key)


def by_name(saved: Mapping[str, Any], parameters: list[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """What `optimizer_state` would have given, from a ``state_dict`` of a plain optimizer.

    Args:
        saved: Of an optimizer over all of these parameters, in their order.
        parameters: Names and parameters of the model.

    Raises:
        CheckpointError: The optimizer was over something else.
    """
    order = [index for group in saved['param_groups'] for index in group['params']]
    if len(order) != len(parameters):
        raise CheckpointError(
            f"the checkpoint's optimizer is over {len(order)} parameters, the model has "
            f'{len(parameters)}: resume without --deepspeed, as in the run that wrote it'
        )
    named = dict(zip(order, (name for name, _ in parameters), strict=True))
    return {
        'state': {named[index]: value for index, value in saved['state'].items()},
        'param_groups': [
            {key: value for key, value in group.items() if key != 'params'}
            for group in saved['param_groups']
        ],
    }


def by_index(saved: Mapping[str, Any], optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """A ``state_dict`` for a plain optimizer from what `optimizer_state` gave.

    Raises:
        CheckpointError: The optimizer has other groups.
    """
    if len(saved['param_groups']) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved['param_groups'])} parameter groups, the "
            f"config's has {len(optimizer.param_groups)}: resume with the config that wrote it"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    state, groups, index = {}, [], 0
    for group, options in zip(optimizer.param_groups, saved['param_groups'], strict=True):
        indices = []
        for parameter in group['params']:
            name = names[id(parameter)]
            if name in saved['state']:
                state[index] = saved['state'][name]
            indices.append(index)
            index += 1
        groups.append({**options, 'params': indices})
    return {'state': state, 'param_groups': groups}


def _flat_groups(engine: Any) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """Flat buffers of float32 masters of this rank, and the parameters that lie in them."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        yield from zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    else:
        yield from zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)


def _link_slices(engine: Any) -> None:
    """Makes the slices through which ZeRO-1 and -2 look at the states in their flat buffers.

    DeepSpeed does so after the first step of the first parameter group, when the others have none.
    """
    link = getattr(engine.optimizer, '_lazy_init_hp_params_optimizer_state', None)
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def _set_full(engine: Any, parameter: Any, value: Tensor, key: str | None) -> None:
    """This rank's share of a master (``key`` ``None``) or of an optimizer state."""
    if engine.zero_optimization_stage() < 3:
        parameter.set_full_hp_param(value, key)
        return
    # DeepSpeed's own setter fails where a parameter does not divide by the number of ranks.
    share, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, key)
    start = share.numel() * torch.distributed.get_rank(engine.optimizer.dp_process_group)
    own = value.flatten()[start : start + share.numel()]
    share.zero_()
    share[: len(own)].copy_(own)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, 'ds_shape', parameter.shape)


def _covers(value: Any, shape: torch.Size) -> bool:
    """Whether a state has a value for each element (a step count has not)."""
    return isinstance(value, Tensor) and value.shape == shape and value.dim() > 0


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
