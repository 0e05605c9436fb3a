"""Checkpoints of a run as a folder in the official layout, and the way back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from mmengine.config import Config
from torch import Tensor

from projects.llava_sam2_rl.engine.checkpoint_files import (
    INCOMPLETE,
    check_checkpoint,
    load_from_local,
)
from projects.llava_sam2_rl.engine.deepspeed_runner import PLAIN
from projects.llava_sam2_rl.models import DualLoopModel
from projects.llava_sam2_rl.models.sa2va.checkpoint import (
    load_xtuner,
    read_weights,
    weight_files,
)
from projects.llava_sam2_rl.preflight.memory import FLOAT, random_weights
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.pretrained import CONFIG_NAME, read_config, resolve

WEIGHTS = ('policy', 'teacher')
#: What official inference needs beside weights, config and tokenizer.
_CARRIED = ('*.py', 'generation_config.json', 'preprocessor_config.json', 'LICENSE*')
_PARTS = (
    'vision_model.',
    'mlp1.',
    'language_model.',
    'text_hidden_fcs.',
    'grounding_encoder.sam2_model.',
)


def export(
    config: Config,
    checkpoint: str | Path | None,
    out: str | Path,
    weights: str = 'policy',
    dtype: torch.dtype | None = None,
) -> DualLoopModel:
    """Writes a trained model in the official layout: LoRA merged, tokenizer beside it.

    What was not trained (``embed_tokens`` and ``lm_head``, as a rule) is the base model's own, to
    the bit. Entries of the base's ``config.json`` and its code files are carried over, so that
    official inference finds what it looks for.

    Args:
        config: The config that was trained.
        checkpoint: ``iter_*.pth`` of a run, a folder that DeepSpeed wrote, or a checkpoint of the
            official recipe; ``None`` for the base model as it is.
        out: A folder that does not exist, or is empty. It appears when it is whole.
        weights: ``'policy'`` or ``'teacher'``. Defaults to ``'policy'``.
        dtype: Data type of the tensors. Defaults to the config's ``torch_dtype``.

    Returns:
        The model that was written, adapters not merged, with the weights of the policy.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, of another config, or has no teacher.
        FileExistsError: ``out`` holds something.
        MemoryError, OSError: As of `check_room`.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f'{out} is there already: name a folder that is new or empty')
    check_room(config, checkpoint, out, dtype)
    model = MODELS.build(config.model)
    if checkpoint is not None:
        load_training_checkpoint(model, checkpoint, weights)
    policy = model.policy
    base = config.model.policy.get('pretrained')
    if base is not None:
        policy.config = _merged(read_config(resolve(base)), policy.config)
    incomplete = out.with_name(out.name + INCOMPLETE)
    shutil.rmtree(incomplete, ignore_errors=True)
    if weights == 'teacher':
        with model.teacher_applied():
            policy.save_pretrained(incomplete, dtype)
    else:
        policy.save_pretrained(incomplete, dtype)
    if base is not None:
        for pattern in _CARRIED:
            for file in resolve(base).glob(pattern):
                shutil.copyfile(file, incomplete / file.name)
    if out.exists():
        out.rmdir()
    os.replace(incomplete, out)
    return model


def check_room(
    config: Config, checkpoint: str | Path | None, out: Path, dtype: torch.dtype | None = None
) -> None:
    """Refuses an export that has no room, before weights are read.

    An export has the model whole, also where the run had it in parts (ZeRO-3): in memory the model,
    the teacher's float32 shadows, what the checkpoint holds and the tensors to be written, and
    these on disk.

    Args: As of `export`.

    Raises:
        MemoryError: This machine has less memory than that free.
        OSError: The disk has less than that free.
    """
    policy = random_weights(config.model.policy)
    with torch.device('meta'):
        model = MODELS.build({**policy, 'checkpoint': None, 'quantization': None})
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    written = count * (dtype or model.torch_dtype).itemsize
    needed = count * model.torch_dtype.itemsize + FLOAT * trained + written
    if checkpoint is not None:
        path = Path(checkpoint)
        files = path.rglob('*') if path.is_dir() else [path]
        needed += sum(file.stat().st_size for file in files if file.is_file())
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f'the export has the whole model in memory and takes about {needed / 1e9:.1f} GB, of '
            f'which {free / 1e9:.1f} GB are free: run it on a machine with more, by itself'
        )
    there = out.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if written > free:
        raise OSError(
            f'the model takes {written / 1e9:.1f} GB, the disk of {out} has {free / 1e9:.1f} GB '
            'free: name a folder on another one'
        )


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``own`` over ``base``, section by section."""
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merged(below, value)
        merged[key] = value
    return merged


def load_training_checkpoint(
    model: DualLoopModel, checkpoint: str | Path, weights: str = 'policy'
) -> None:
    """Loads what a run saved: the policy, and the teacher where it is asked for.

    Args:
        model: The model of the config that was trained.
        checkpoint: See `export`.
        weights: ``'policy'`` or ``'teacher'``, which the checkpoint must hold. Defaults to
            ``'policy'``.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, of another config, or has no teacher.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be 'policy' or 'teacher', got {weights!r}")
    path = Path(checkpoint)
    if (path / PLAIN).is_file():
        path = path / PLAIN  # what this project puts beside DeepSpeed's own files
    content = consolidate_zero(path) if path.is_dir() else load_from_local(str(path))
    state = content.get('state_dict', content)
    if any(key.removeprefix('module.').startswith('policy.') for key in state):
        state = {key.removeprefix('module.'): value for key, value in state.items()}
        content = {**content, 'state_dict': state}
        model.upgrade_checkpoint(content, path, resume=False)
        # As for going on with a run: everything that is trained must be there.
        check_checkpoint({'meta': {}, 'state_dict': state}, model, path)
        model.load_state_dict(state, strict=False)
    elif path.is_dir():
        raise CheckpointError(
            f'{path} holds no tensor of a policy: its keys begin with {next(iter(state), "")!r}'
        )
    else:
        load_xtuner(model.policy, path)
    if weights == 'policy':
        return
    if 'teacher' not in content:
        raise CheckpointError(
            f'{path} holds no teacher: the run that wrote it had no EMATeacherHook. Take the policy'
        )
    model.teacher.load_state_dict(content['teacher'])


def consolidate_zero(folder: str | Path) -> dict[str, Any]:
    """The float32 weights of a checkpoint that DeepSpeed wrote in shards (ZeRO 1 to 3).

    Args:
        folder: One checkpoint (``iter_N.pth/`` with ``*_model_states.pt``), or the folder above,
            whose ``latest`` names one.

    Returns:
        ``state_dict`` and what else the run saved beside it (``meta``, ``teacher``).

    Raises:
        CheckpointError: There is no such checkpoint, a shard is damaged or missing, or a file
            holds Python objects other than DeepSpeed's own.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f'there is no checkpoint folder {folder}: correct the path')
    if (folder / 'latest').is_file():
        folder = folder / (folder / 'latest').read_text(encoding='utf-8').strip()
    models = sorted(folder.glob('*_model_states.pt'))
    shards = sorted(folder.glob('*_optim_states.pt'))
    if not models or not shards:
        raise CheckpointError(
            f'{folder} holds {len(models)} *_model_states.pt and {len(shards)} *_optim_states.pt: '
            "it is no ZeRO checkpoint (expected DeepSpeed's files, or `latest` that names a folder)"
        )
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    plain = [set, LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    content: dict[str, Any] = {}
    # DeepSpeed reads its files by plain pickle. They are read here first, in a way that refuses
    # everything but tensors and its own records.
    for file in [*shards, *reversed(models)]:
        try:
            with torch.serialization.safe_globals(plain):
                content = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        except Exception as error:  # torch raises several unrelated types
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error)
            raise CheckpointError(
                f'{file} is damaged, or holds Python objects that DeepSpeed did not write '
                f'({reason}): use another checkpoint of the run'
            ) from error
    try:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name)
    except (AssertionError, FileNotFoundError, KeyError, ValueError) as error:
        raise CheckpointError(
            f'{folder} cannot be put together ({error}): a shard of a rank may be missing, there '
            f'are {len(shards)}'
        ) from error
    kept: dict[str, Any] = {k: content[k] for k in ('meta', 'teacher') if k in content}
    return {'state_dict': {key: tensor.detach() for key, tensor in state.items()}, **kept}


def official_to_xtuner(folder: str | Path, out: str | Path) -> int:
    """Writes a model in the official layout as one ``.pth`` under the official recipe's names.

    For training code that starts from such a file (``checkpoint=`` of `VideoLLaVASAMModel`). The
    configs of this project read the folder itself (``pretrained=``).

    Args:
        folder: A model in the official layout.
        out: The file; appears when it is whole.

    Returns:
        Number of tensors.

    Raises:
        CheckpointError: The folder is missing, damaged, or holds other tensors than a Sa2VA model.
    """
    folder, out = resolve(folder), Path(out)
    read_config(folder)
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for key, tensor in read_weights(file):
            if not key.startswith(_PARTS):
                raise CheckpointError(f'{file}: {key} is not part of a Sa2VA model')
            state[xtuner_name(key)] = tensor
    lacking = [part for part in _PARTS if not any(part in key for key in state)]
    if lacking:
        raise CheckpointError(f'{folder} holds no tensor of {", ".join(lacking)}')
    out.parent.mkdir(parents=True, exist_ok=True)
    incomplete = out.with_name(out.name + INCOMPLETE)
    torch.save({'meta': {}, 'state_dict': state}, incomplete)
    os.replace(incomplete, out)
    return len(state)


def xtuner_name(name: str) -> str:
    """From the official layout's name of a tensor to the one in the official recipe's ``.pth``."""
    if name.startswith(('vision_model.', 'mlp1.', 'language_model.')):
        return f'mllm.model.{name}'
    # Below `memory_encoder.fuser` only; transformers renames `gamma` on load.
    return name.replace('.g_weight', '.gamma')


def describe_folder(folder: str | Path) -> str:
    """One line about what `export` wrote: tensors, parameters, bytes."""
    folder = Path(folder)
    tensors = [t for file in weight_files(folder) for _, t in read_weights(file)]
    parameters = sum(t.numel() for t in tensors)
    size = sum(t.numel() * t.element_size() for t in tensors)
    dtypes = ', '.join(sorted({str(t.dtype).removeprefix('torch.') for t in tensors}))
    kind = json.loads((folder / CONFIG_NAME).read_text(encoding='utf-8'))['model_type']
    return (
        f'{kind}: {len(tensors)} tensors, {parameters:,} parameters, {size / 1e9:.2f} GB {dtypes}'
    )
