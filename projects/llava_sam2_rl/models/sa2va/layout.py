"""The official layout of checkpoints: which tensor of the model stands where, under which name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from projects.llava_sam2_rl.models.sa2va import internlm2
from projects.llava_sam2_rl.models.sa2va.internvl import INTERNLM2, architecture
from projects.llava_sam2_rl.models.sa2va.quantization import beside_weights
from projects.llava_sam2_rl.utils.errors import CheckpointError

# transformers renames `gamma` on load, so the official layout calls SAM 2's layer scale `g_weight`.
_SAM_GAMMA = re.compile(r'(memory_encoder\.fuser\.layers\.\d+)\.gamma$')
_HF_GAMMA = re.compile(r'(memory_encoder\.fuser\.layers\.\d+)\.g_weight$')
_LANGUAGE = 'language_model.'
_PEFT_PREFIX = 'language_model.base_model.model.'


@dataclass(frozen=True)
class Part:
    """A tensor of the model, and where its values stand in the official one.

    Args:
        name: In the model's ``state_dict``.
        rows: ``(n,)`` int64, the rows of the official tensor that are this one's; ``None`` where
            it is all of it.
    """

    name: str
    rows: Tensor | None = None


def is_lora(name: str) -> bool:
    """Whether a parameter belongs to an adapter rather than to the model under it."""
    return '.lora_' in name


def official_name(name: str, model: nn.Module) -> str:
    """From this package's parameter name to the official one (LoRA tensors excepted)."""
    name = file_name(name)
    if _is_internlm2(model) and name.startswith(_LANGUAGE):
        return internlm2.internlm2_name(name)[0]
    return name


def file_name(name: str) -> str:
    """A name as files in the official layout have it: without peft's additions, no ``gamma``."""
    if name.startswith(_PEFT_PREFIX):
        name = _LANGUAGE + name[len(_PEFT_PREFIX) :]
    name = name.replace('.base_layer.', '.').replace('.original_module.', '.')
    return _SAM_GAMMA.sub(r'\1.g_weight', name)


def official_layout(model: nn.Module) -> dict[str, list[Part]]:
    """Official name -> the tensors of the model that hold it: one, or three of a fused matrix."""
    rows = _fused_rows(model)
    scales = beside_weights(model)
    layout: dict[str, list[Part]] = {}
    for name in model.state_dict():
        if is_lora(name) or '.modules_to_save.' in name or name in scales:
            continue
        which = None
        if rows and name.startswith(_LANGUAGE):
            _, which = internlm2.internlm2_name(name)
        part = Part(name, rows[which] if which else None)
        layout.setdefault(official_name(name, model), []).append(part)
    return layout


def official_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Official name -> shape, for every tensor of the official layout."""
    state = model.state_dict()
    shapes = {}
    for official, parts in official_layout(model).items():
        shape = state[parts[0].name].shape
        if len(parts) > 1:
            shape = torch.Size([sum(len(state[part.name]) for part in parts), *shape[1:]])
        shapes[official] = shape
    return shapes


def put(state: Mapping[str, Tensor], parts: list[Part], tensor: Tensor) -> None:
    """Copies an official tensor into those of the model."""
    for part in parts:
        state[part.name].copy_(tensor if part.rows is None else tensor[part.rows])


def fuse(parts: list[Part], tensors: list[Tensor]) -> Tensor:
    """The official tensor of those of the model, bit for bit."""
    rows = [part.rows for part in parts if part.rows is not None]
    if not rows:
        return tensors[0]
    return torch.cat(tensors)[torch.cat(rows).argsort()]


def own_tensors(model: nn.Module, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor of a training checkpoint under the model's names, as far as they differ by kind.

    Args:
        model: Whose checkpoint it is.
        name: Official, ``language_model.`` and the like in front, adapters included.
        tensor: Its value.

    Raises:
        CheckpointError: It is of a fused matrix of another size.
    """
    name = _HF_GAMMA.sub(r'\1.gamma', name)
    rows = _fused_rows(model)
    if not rows or not name.startswith(_LANGUAGE):
        yield name, tensor
        return
    try:
        yield from internlm2.split(name, tensor, rows).items()
    except ValueError as error:
        raise CheckpointError(f'{error}: it is of another language model') from error


def upgrade_training_checkpoint(
    policy: nn.Module, checkpoint: dict[str, Any], path: Any, *, resume: bool
) -> None:
    """Makes a checkpoint of 0.1.0 one of today, in place.

    There InternLM2 was trained under its own names, with one adapter for queries, keys and values.

    Args:
        policy: The model.
        checkpoint: Of a run: ``state_dict`` and ``teacher``, where it has them; or weights alone.
        path: Where it comes from.
        resume: Whether its optimizer is to go on.

    Raises:
        CheckpointError: It is such a checkpoint and ``resume`` is set.
    """
    if not _is_internlm2(policy):
        return
    state = checkpoint.get('state_dict', checkpoint)
    if not any(_is_old(name) for name in state):
        return
    if resume:
        raise CheckpointError(
            f"{path} was written by 0.1.0, which trained InternLM2's queries, keys and values as "
            f'one matrix ({internlm2.FUSED}): its optimizer state does not fit the three of today. '
            'Give it as `load_from` to start from its weights, or resume with 0.1.0'
        )
    for tensors in (state, checkpoint.get('teacher', {}).get('shadows', {})):
        for name in [name for name in tensors if _is_old(name)]:
            before, _, rest = name.partition(_LANGUAGE)
            for own, part in own_tensors(policy, _LANGUAGE + rest, tensors.pop(name)):
                tensors[before + own] = part


def _is_old(name: str) -> bool:
    _, mark, rest = name.partition(_LANGUAGE)
    return bool(mark) and internlm2.is_internlm2_name(rest)


def _is_internlm2(model: Any) -> bool:
    return architecture(model.config['llm_config']) == INTERNLM2


def _fused_rows(model: Any) -> dict[str, Tensor]:
    """See `internlm2.fused_rows`; empty for other language models."""
    if not _is_internlm2(model):
        return {}
    with torch.device('cpu'):  # the model itself may be on the meta device
        return internlm2.fused_rows(model.language_model.config)


def same_tensor(name: str, state: Mapping[str, Tensor]) -> str:
    """The model's name for a tensor that peft names by what wraps it."""
    plain = (
        name.replace('.modules_to_save.default.', '.')
        .replace('.original_module.', '.')
        .replace('.base_layer.', '.')
    )
    bare = plain.replace(_PEFT_PREFIX, _LANGUAGE)
    parent, _, leaf = plain.rpartition('.')
    candidates = (
        name,
        plain,
        bare,
        f'{parent}.modules_to_save.default.{leaf}',
        f'{parent}.base_layer.{leaf}',
    )
    return next((c for c in candidates if c in state), name)
