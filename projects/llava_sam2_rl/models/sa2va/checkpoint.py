"""Reading and writing checkpoints: the official Hugging Face layout and xtuner's ``.pth``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from projects.llava_sam2_rl.models.sa2va.layout import (
    Part,
    file_name,
    fuse,
    is_lora,
    official_layout,
    official_name,
    official_shapes,
    own_tensors,
    put,
    same_tensor,
)
from projects.llava_sam2_rl.models.sa2va.quantization import (
    quantized_layers,
    refuse_float_weights,
)
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.pretrained import CONFIG_NAME

SAFETENSORS_NAME = 'model.safetensors'
_INDEXES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
_SINGLES = (SAFETENSORS_NAME, 'pytorch_model.bin')


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a folder: safetensors before ``.bin``, sharded or not.

    Raises:
        CheckpointError: There are none, or a shard that the index names is missing.
    """
    folder = Path(folder)
    for single, index in zip(_SINGLES, _INDEXES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = json.loads((folder / index).read_text(encoding='utf-8'))['weight_map'].values()
            files = [folder / name for name in sorted(set(names))]
            for file in files:
                if file.resolve().parent != folder.resolve():
                    raise CheckpointError(f'{folder / index} names a file outside: {file}')
                if not file.is_file():
                    raise CheckpointError(f'{file} is missing, {index} names it: download it again')
            return files
    raise CheckpointError(f'{folder} holds no weights: expected {" or ".join(_SINGLES)} or shards')


def read_weights(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of one weight file, one at a time where the format allows.

    Raises:
        CheckpointError: The file is truncated or not what its name says.
    """
    path = Path(path)
    if path.suffix == '.safetensors':
        try:
            with safe_open(str(path), framework='pt') as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield key, file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f'{path} is truncated or damaged ({error}): download it again'
            ) from error
        return
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises several unrelated types for damaged files
        raise CheckpointError(
            f'{path} cannot be read as tensors only ({error}): it is damaged, or holds pickled '
            'code, which is refused'
        ) from error
    for _ in range(2):  # xtuner: {'state_dict': …}; DeepSpeed consolidated: {'module': …}
        for wrapper in ('state_dict', 'module'):
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
    yield from content.items()


def difference(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str | None:
    """What is missing, unexpected or of another shape, as one text; ``None`` where all fits."""

    def names(items: Iterable[str]) -> str:
        items = sorted(items)
        more = f' … and {len(items) - 20} more' if len(items) > 20 else ''
        return '\n  '.join(['', *items[:20]]) + more

    parts = []
    if missing := set(expected) - set(found):
        parts.append(f'missing {len(missing)}:{names(missing)}')
    if unexpected := set(found) - set(expected):
        parts.append(f'unexpected {len(unexpected)}:{names(unexpected)}')
    wrong = [
        f'{k}: checkpoint {tuple(found[k])}, model {tuple(expected[k])}'
        for k in set(expected) & set(found)
        if expected[k] != found[k]
    ]
    if wrong:
        parts.append(f'wrong shape {len(wrong)}:{names(wrong)}')
    return '\n'.join(parts) or None


def load_official(model: nn.Module, folder: str | Path) -> None:
    """Loads a checkpoint in the official layout into ``model``, in place.

    Raises:
        CheckpointError: Any key is missing, unexpected or of another shape; all are listed.
            Nothing is loaded then.
    """
    files = weight_files(folder)
    layout, expected = official_layout(model), official_shapes(model)
    state = model.state_dict()
    # Two passes, so that a checkpoint that does not fit changes nothing and one that does is
    # never held twice.
    # transformers writes either name of SAM 2's layer scale, depending on its version.
    found = {file_name(k): shape for file in files for k, shape in _read_shapes(file)}
    head, embedding = _tied_head(model) or (None, None)
    if head is not None and embedding in found:
        found.setdefault(head, found[embedding])
    if problem := difference(expected, found):
        problem += _other_vocabulary(model, found)
        raise CheckpointError(f'{folder} does not fit this model:\n{problem}')
    with torch.no_grad():
        for file in files:
            for key, tensor in read_weights(file):
                put(state, layout[file_name(key)], tensor)


def _read_shapes(path: Path) -> Iterator[tuple[str, torch.Size]]:
    if path.suffix != '.safetensors':
        yield from ((key, tensor.shape) for key, tensor in read_weights(path))
        return
    try:
        with safe_open(str(path), framework='pt') as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                yield key, torch.Size(file.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f'{path} is truncated or damaged ({error}): download it again'
        ) from error


def _other_vocabulary(model: Any, found: Mapping[str, torch.Size]) -> str:
    """A line about embeddings of another size than the config says; empty where they fit."""
    embeddings = model.language_model.get_input_embeddings()
    shape = found.get(_weight_name(model, embeddings))
    if not shape or shape[0] == embeddings.num_embeddings:
        return ''
    return (
        f'\nThe embeddings have {shape[0]} rows, llm_config.vocab_size in {CONFIG_NAME} is '
        f'{embeddings.num_embeddings}: correct it, or take the {CONFIG_NAME} and tokenizer of '
        'these weights'
    )


def _tied_head(model: Any) -> tuple[str, str] | None:
    """Official names of the head and the embedding it shares its weight with, if it does."""
    language_model = model.language_model
    if not getattr(language_model.config, 'tie_word_embeddings', False):
        return None
    return (
        _weight_name(model, language_model.get_output_embeddings()),
        _weight_name(model, language_model.get_input_embeddings()),
    )


def _weight_name(model: Any, module: nn.Module) -> str:
    """Official name of the weight of a module of the language model."""
    # By module: a tied weight is one object, under two names.
    names = {id(found): name for name, found in model.language_model.named_modules()}
    return official_name(f'language_model.{names[id(module)]}.weight', model)


def merged_state(
    model: nn.Module, dtype: torch.dtype, folder: str | Path | None = None
) -> dict[str, Tensor]:
    """The whole model under official names, LoRA merged into its base weights, on the CPU.

    The model itself is left as it is.

    Args:
        model: With or without adapters.
        dtype: Of the tensors that hold floats.
        folder: From which it was loaded; read again for layers that are in 4 or 8 bits.

    Raises:
        CheckpointError: There are such layers and ``folder`` is ``None``, or has gone.
    """
    state = model.state_dict()
    deltas = _lora_deltas(model)
    # A module that peft trains beside the adapter replaces the original under the same name.
    trained = {
        name.replace('.modules_to_save.default.', '.original_module.'): tensor
        for name, tensor in state.items()
        if '.modules_to_save.default.' in name
    }
    layout = official_layout(model)
    base = _base_weights(model, layout, folder)

    def merged(name: str) -> Tensor:
        tensor = base.pop(name) if name in base else trained.get(name, state[name])
        if name in deltas:
            delta = deltas[name]().float().to(tensor.device)
            tensor = (tensor.float() + delta).to(tensor.dtype)
        tensor = tensor.detach().cpu().contiguous()
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return {
        official: fuse(parts, [merged(part.name) for part in parts])
        for official, parts in layout.items()
    }


def _base_weights(
    model: Any, layout: Mapping[str, list[Part]], folder: str | Path | None
) -> dict[str, Tensor]:
    """Name -> weight or bias of layers that are in 4 or 8 bits, as it was before."""
    layers = quantized_layers(model)
    if not layers:
        return {}
    if folder is None:
        raise CheckpointError(
            f'the weights of {len(layers)} layers are in 4 or 8 bits and there is no `pretrained` '
            'folder to read them from again: build the model with `pretrained`'
        )
    wanted = {f'{name}.{key}' for name in layers for key in ('weight', 'bias')}
    found = {}
    for file in weight_files(folder):
        for key, tensor in read_weights(file):
            for part in layout.get(file_name(key), ()):
                if part.name in wanted:
                    rows = tensor if part.rows is None else tensor[part.rows]
                    found[part.name] = rows.to(model.torch_dtype)
    return found


def _lora_deltas(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Name of a base weight -> what its adapters add to it."""

    def delta(layer: Any) -> Tensor:
        return sum(layer.get_delta_weight(name) for name in layer.active_adapters)

    return {
        f'{name}.base_layer.weight': partial(delta, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, 'get_delta_weight')
    }


def save_official(state: Mapping[str, Tensor], config: dict, folder: str | Path) -> None:
    """Writes ``config.json`` and ``model.safetensors`` in the official layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, seen = {}, set()
    for key, tensor in state.items():
        # safetensors refuses tensors that share memory (tied embeddings).
        tensors[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(tensors, str(folder / SAFETENSORS_NAME), metadata={'format': 'pt'})
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / CONFIG_NAME).write_text(text + '\n', encoding='utf-8')
    # safetensors makes its file for the owner alone; whoever may read one may read the other.
    (folder / SAFETENSORS_NAME).chmod((folder / CONFIG_NAME).stat().st_mode & 0o777)


def load_xtuner(model: nn.Module, path: str | Path) -> list[str]:
    """Loads a training checkpoint of the official recipe (xtuner ``.pth``) into ``model``.

    Such a file holds trainable tensors only, with ``mllm.model.`` before the vision, projector and
    language keys. Of InternLM2 the recipe adapts the head as well, which is trained whole besides;
    where the model has no adapter there, that of the file is merged into the head.

    Returns:
        The names that were loaded.

    Raises:
        CheckpointError: A key is unexpected or of another shape, or the file holds LoRA tensors
            and the model has none.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'no checkpoint file {str(path)!r}: correct the path')
    state = model.state_dict()
    tensors = {}
    for key, tensor in read_weights(path):
        name = key.removeprefix('mllm.model.').removeprefix('mllm.')
        for own, part in own_tensors(model, name, tensor):
            tensors[same_tensor(own, state)] = part
    refuse_float_weights(model, tensors, path)
    adapters = [name for name in tensors if is_lora(name)]
    if adapters and not any(is_lora(name) for name in state):
        rank = next(tensors[n].shape[0] for n in adapters if '.lora_A.' in n)
        raise CheckpointError(
            f'{path} holds LoRA tensors of rank {rank}, the model has no LoRA: '
            f'pass lora=dict(r={rank}, lora_alpha=…) as in training'
        )
    _merge_head_adapter(model, tensors, state, path)
    expected = {name: state[name].shape for name in tensors if name in state}
    if not expected:
        raise CheckpointError(f'{path} holds no tensor of this model: it is not a Sa2VA checkpoint')
    if problem := difference(expected, {n: t.shape for n, t in tensors.items()}):
        raise CheckpointError(f'{path} does not fit this model:\n{problem}')
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    return sorted(tensors)


def _merge_head_adapter(
    model: Any, tensors: dict[str, Tensor], state: Mapping[str, Tensor], path: Path
) -> None:
    """Replaces an adapter of the head by the head's weight with it merged, in place.

    Nothing happens where the file has none, or the model one of its own.
    """
    first = next((name for name in tensors if name.endswith('.lm_head.lora_A.default.weight')), '')
    second = first.replace('.lora_A.', '.lora_B.')
    if not first or first in state or second not in tensors:
        return
    a, b = tensors.pop(first).float(), tensors.pop(second).float()
    options = model.language_model.peft_config['default']
    if len(a) != options.r:
        raise CheckpointError(
            f'{path}: the LoRA layer of the head (output or lm_head) has rank {len(a)}, the model '
            f'{options.r}: pass lora=dict(r={len(a)}, lora_alpha=…) as in training'
        )
    scale = options.lora_alpha / (options.r**0.5 if options.use_rslora else options.r)
    name = same_tensor(first.replace('.lora_A.default.', '.'), state)
    head = tensors.get(name, state[name])
    tensors[name] = (head.float() + scale * (b @ a).to(head.device)).to(head.dtype)
