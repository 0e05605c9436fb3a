"""A frozen language model in 4 or 8 bits: its linear layers are bitsandbytes', adapters on top.

``'nf4'`` is the 4-bit NormalFloat of Dettmers et al. 2023 ("QLoRA", arXiv:2305.14314), with double
quantisation; ``'int8'`` is Dettmers et al. 2022 ("LLM.int8()", arXiv:2208.07339).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from projects.llava_sam2_rl.registry import nearest
from projects.llava_sam2_rl.utils.errors import CheckpointError, StackError

#: Values of ``quantization`` besides ``None``.
KINDS = ('nf4', 'int8')
#: The first tested bitsandbytes that computes on a CPU too.
OLDEST = '0.49.2'
# What a weight is rounded together with: 64 weights share a scale, 256 scales one of their own.
_BLOCK, _SCALES = 64, 256
# Classes of bitsandbytes by name: it need not be installed to ask whether a layer is its own.
_WEIGHTS = ('Params4bit', 'Int8Params')
# What `lora.modules_to_save` may name: embeddings and head, InternLM2's names behind Llama's.
_NOT_ROUNDED = frozenset(('embed_tokens', 'lm_head', 'tok_embeddings', 'output'))


def check_quantization(
    kind: str | None, trainable: Sequence[str] = (), lora: Mapping[str, Any] | None = None
) -> None:
    """Refuses what cannot be honoured; takes some milliseconds, once a process.

    Args:
        kind: ``'nf4'``, ``'int8'``, or ``None``: then there is nothing to refuse.
        trainable: Parts that are trained.
        lora: Options of `peft.LoraConfig`.

    Raises:
        ValueError: ``kind`` is unknown, or the language model is to be trained itself.
        StackError: bitsandbytes is missing, too old, or has no kernel for a device of this machine.
    """
    if kind is None:
        return
    if kind not in KINDS:
        raise ValueError(f'quantization={kind!r}: {nearest(str(kind), list(KINDS))}, or None')
    if 'language_model' in trainable:
        raise ValueError(
            f"quantization={kind!r} freezes the language model and trainable names 'language_model'"
            ": train 'lora' instead, or leave quantization out"
        )
    named = (lora or {}).get('modules_to_save') or ()
    whole = sorted({name.rpartition('.')[2] for name in named} - _NOT_ROUNDED)
    if whole:
        raise ValueError(
            f'quantization={kind!r} freezes the linear layers of the language model and '
            f'lora.modules_to_save trains {", ".join(whole)} whole: name embed_tokens and lm_head '
            'alone, or leave quantization out'
        )
    check_installed()
    check_kernels(kind, 'cpu')
    if torch.cuda.is_available():
        check_kernels(kind, 'cuda')


def check_installed() -> None:
    """Looks at the version of bitsandbytes.

    Raises:
        StackError: It is missing or too old.
    """
    fix = f'pip install "bitsandbytes>={OLDEST}"'
    try:
        version = metadata.version('bitsandbytes')
    except metadata.PackageNotFoundError:
        raise StackError(
            f'quantization needs bitsandbytes, which is not installed: {fix}'
        ) from None
    if Version(version) < Version(OLDEST):
        raise StackError(f'bitsandbytes {version} is too old for quantization: {fix}')


@lru_cache(maxsize=8)
def check_kernels(kind: str, device: str) -> None:
    """Tries a layer forwards and backwards; no random state is changed.

    Args:
        kind: See `check_quantization`.
        device: ``'cpu'`` or ``'cuda'``.

    Raises:
        StackError: It fails there, or gives something else than the layer it was made of.
    """
    with (
        torch.random.fork_rng(devices=[]),
        torch.device('cpu'),
        torch.autocast(device, enabled=False),
        torch.inference_mode(False),
    ):
        torch.manual_seed(0)
        layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
        x = torch.randn(8, 64)
        expected = x @ layer.weight.T, torch.ones(8, 64) @ layer.weight
        try:
            with torch.enable_grad():
                made = _quantized(layer, kind, torch.float32, device).to(device)
                given = x.to(device, copy=True).requires_grad_()
                out = made(given)
                out.sum().backward()
            found = out.detach().cpu(), torch.as_tensor(given.grad).cpu()
        except Exception as error:  # a missing library shows as one of many types
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            raise StackError(
                f'bitsandbytes {metadata.version("bitsandbytes")} cannot compute {kind} on '
                f'{_device_name(device)} ({reason}): '
                'python -m bitsandbytes says what it lacks; or leave quantization out'
            ) from error
    for one, other in zip(found, expected, strict=True):
        off = float((one - other).norm() / other.norm())
        # The rounding itself is some 0.1 in 4 bits.
        if not off < 0.3:
            raise StackError(
                f'bitsandbytes {metadata.version("bitsandbytes")} computes {kind} wrongly on '
                f'{_device_name(device)}: off by {off:.2g} of the result (at most 0.3)'
            )


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == 'cuda' else 'the CPU'


def quantize(language_model: PreTrainedModel, kind: str | None, dtype: torch.dtype) -> None:
    """Puts the linear layers of the decoder into 4 or 8 bits, in place, and freezes them.

    Embeddings, norms and the head stay what they are. A GPU does it where there is one, layer by
    layer; a CPU takes some two minutes for a billion weights in 4 bits. On the meta device layers
    are exchanged and keep the shapes of their weights.

    Args:
        language_model: With the weights that count, without adapters.
        kind: ``'nf4'``, ``'int8'``, or ``None``: then nothing happens.
        dtype: In which 4-bit layers are multiplied.
    """
    if kind is None:
        return
    head = language_model.get_output_embeddings()
    layers = {
        name: module
        for name, module in language_model.named_modules()
        if type(module) is nn.Linear and module is not head
    }
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    for name in list(layers):
        parent, _, leaf = name.rpartition('.')
        # One at a time: what it was made of is let go of.
        made = _quantized(layers.pop(name), kind, dtype, device)
        setattr(language_model.get_submodule(parent), leaf, made)
    # peft asks for these.
    language_model.is_loaded_in_4bit = kind == 'nf4'
    language_model.is_loaded_in_8bit = kind == 'int8'
    language_model.register_load_state_dict_pre_hook(_refuse_loading)


def _quantized(layer: nn.Linear, kind: str, dtype: torch.dtype, device: str) -> nn.Module:
    """bitsandbytes' layer of the same weights in the same place; ``device`` rounds them."""
    made = _exchanged(layer, kind, dtype)
    options = {key: value for key, value in vars(made.weight).items() if not key.startswith('_')}
    weight = layer.weight.detach()
    if not weight.is_meta:
        # From the CPU to any device, itself included, its weights are rounded on the way.
        new = type(made.weight)(weight.cpu(), requires_grad=False, **options)
        made.weight = new.to(device).to(weight.device)
    made.bias = layer.bias
    made.requires_grad_(False)
    made.train(layer.training)
    if kind == 'nf4':
        # In eval mode it would put the weights into an order for the CPU's AVX512, in bfloat16 and
        # for ever: gradients through it are then lost, without an error (0.49).
        made.support_avx512bf16_for_cpu = False
    elif not weight.is_meta:
        made.init_8bit_state()
        made.register_forward_pre_hook(_follow_weight)
    return made


def _exchanged(layer: nn.Linear, kind: str, dtype: torch.dtype) -> Any:
    """What transformers puts in the place of ``layer``, without its values."""
    # Here, because it imports bitsandbytes, which nobody else needs.
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = BitsAndBytesConfig(
        load_in_4bit=kind == 'nf4',
        load_in_8bit=kind == 'int8',
        bnb_4bit_quant_type='nf4',
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    holder = nn.ModuleDict({'layer': layer})
    with torch.device('meta'):
        replace_with_bnb_linear(holder, modules_to_not_convert=[], quantization_config=config)
    return holder['layer']


def _follow_weight(layer: Any, _: Any) -> None:
    """Moves what an 8-bit layer keeps beside its weight to where the model has been moved."""
    state, device = layer.state, layer.weight.device
    if state.SCB.device != device:
        state.CB, state.SCB = layer.weight.data, state.SCB.to(device)


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Layers of `quantize` by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module._parameters.get('weight')).__name__ in _WEIGHTS
    }


def beside_weights(model: nn.Module) -> set[str]:
    """Names in ``state_dict`` of scales and the like, which no other model has."""
    return {
        f'{name}.{key}'
        for name, layer in quantized_layers(model).items()
        for key in layer.state_dict()
        if key not in ('weight', 'bias')
    }


def refuse_float_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Any) -> None:
    """Refuses to load weights over those that are in 4 or 8 bits.

    Args:
        model: Its layers.
        tensors: What is to be loaded, under the model's names.
        path: Where it comes from.

    Raises:
        CheckpointError: One of ``tensors`` is such a weight, not rounded.
    """
    own = {f'{name}.weight' for name in quantized_layers(model)}
    found = sorted(n for n in own.intersection(tensors) if tensors[n].is_floating_point())
    if found:
        raise CheckpointError(
            f'{path} holds weights of {len(found)} layers that are in 4 or 8 bits ({found[0]}, …), '
            'and these are read from `pretrained` alone: write the model as a folder by '
            'tools/convert_to_hf.py and name that as `pretrained`, or leave quantization out'
        )


def _refuse_loading(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    refuse_float_weights(module, own, 'the checkpoint')


def packed_bytes(rows: int, columns: int, kind: str) -> int:
    """Bytes of a weight in 4 or 8 bits with its scales, tables included.

    Args:
        rows: Output features.
        columns: Input features.
        kind: ``'nf4'`` or ``'int8'``.
    """
    if kind == 'int8':
        return rows * columns + 4 * rows  # a float32 scale a row
    blocks = math.ceil(rows * columns / _BLOCK)
    # Half a byte a weight, a byte a scale; float32: the scales' scales, their mean, two tables.
    return math.ceil(rows * columns / 2) + blocks + 4 * (math.ceil(blocks / _SCALES) + 1 + 16 + 256)


def held_bytes(layer: Any) -> int:
    """Bytes that a layer of `quantize` holds in fact: weight and scales."""
    state = getattr(layer.weight, 'quant_state', None)
    tensors: list[Tensor] = [layer.weight]
    if state is None:
        tensors.append(layer.state.SCB)
    else:
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
