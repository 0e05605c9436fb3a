"""What a config needs of a GPU's memory, by parts, from sizes alone: no weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.losses.logprobs import CHUNK_SIZE
from projects.llava_sam2_rl.models.group_cache import sequences_in_a_row
from projects.llava_sam2_rl.models.sa2va.quantization import packed_bytes, quantized_layers
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.utils.pretrained import complete_sizes, sizes_folder

#: Bytes of a float32.
FLOAT = 4
#: Tensors up to so many elements stay whole under ZeRO-3 (configs/deepspeed/zero3.json).
PERSISTENT = 4_000_000
#: Bytes of a card left to CUDA, its allocator and SAM 2's activations on 1024 px.
MARGIN = 3e9
# Parts of the prediction that are there at the end of a step and not while rollouts last.
_NOT_IN_A_ROLLOUT = ('gradients', 'activations, checkpoints', 'weights put together')


@dataclass(frozen=True)
class Sizes:
    """What the prediction depends on.

    Args:
        frozen: Parameters that are not trained.
        trained: Parameters that are.
        bytes: Of a frozen weight.
        layers: Of the language model.
        width: Of its hidden states.
        inner: Of its MLP.
        heads: Attention heads.
        kv_width: Key/value heads times their size.
        vocabulary: Its tokens.
        chunk: Tokens whose logits exist at a time.
        grounding: Side in pixels of what SAM 2 sees.
        prompt: Tokens of a region prompt.
        batch: B, samples per rank.
        group: G, rollouts.
        tokens: Longest caption.
        autocast: Whether trained weights are float32 and cast at use.
        rounded: Of the frozen parameters, those of layers in 4 or 8 bits.
        rounded_bytes: What these take, scales included.
        largest: Parameters of the largest such layer.
        small_frozen: Of the frozen parameters, those of tensors that ZeRO-3 leaves whole.
        small_trained: Of the trained ones, likewise.
        language: Parameters of the language model that ZeRO-3 splits.
    """

    frozen: int
    trained: int
    bytes: int
    layers: int
    width: int
    inner: int
    heads: int
    kv_width: int
    vocabulary: int
    chunk: int
    grounding: int
    prompt: int
    batch: int
    group: int
    tokens: int
    autocast: bool = True
    rounded: int = 0
    rounded_bytes: int = 0
    largest: int = 0
    small_frozen: int = 0
    small_trained: int = 0
    language: int = 0


def predict(sizes: Sizes, gpus: int = 1, zero: int = 0) -> dict[str, int]:
    """Bytes on one GPU by part; their sum is the peak, in the backward pass of the captions.

    Args:
        sizes: See `Sizes`.
        gpus: W, ranks.
        zero: Stage of ZeRO, 0 = DDP or one process.
    """
    b, trained = sizes.bytes, sizes.trained
    share = 1 / gpus if zero else 1.0
    # Rows of the pass with gradients: each prompt once, its completions behind it.
    rows = sizes.batch * (sizes.prompt + sizes.group * sizes.tokens)
    # One layer is recomputed at a time: norms, q, k, v, the attention's output and three tensors
    # of the MLP, all with their gradients, LoRA's inputs among them.
    one_layer = 2 * rows * b * (6 * sizes.width + 2 * sizes.kv_width + 3 * sizes.inner)
    logits = 3 * sizes.chunk * sizes.vocabulary * FLOAT
    # Of a prompt's keys and values, beside those of the prefill.
    copies = sizes.group // sequences_in_a_row(sizes.group, sizes.tokens)
    rounded = {
        'frozen weights in 4 or 8 bits': sizes.rounded_bytes,
        # Each is made whole again for its product, forwards and backwards.
        'one of them as it is used': b * sizes.largest,
    }
    frozen = sizes.frozen - sizes.rounded
    together = 0
    if zero == 3:
        frozen = int(_held(sizes.frozen, sizes.small_frozen, gpus))
        trained_here = int(_held(trained, sizes.small_trained, gpus))
        layer = sizes.width * (2 * sizes.width + 2 * sizes.kv_width + 3 * sizes.inner)
        together = b * max(layer, sizes.vocabulary * sizes.width)
    else:
        trained_here = trained
    return {
        'frozen weights': b * frozen,
        **(rounded if sizes.rounded else {}),
        'trained weights': (b if zero else FLOAT) * trained_here,
        **({'weights put together': together} if together else {}),
        'their copies under autocast': b * trained if sizes.autocast and not zero else 0,
        'gradients': (b if zero else FLOAT) * trained,
        'float32 masters': int(FLOAT * trained * share) if zero else 0,
        'AdamW moments': int(2 * FLOAT * trained * share),
        'teacher': FLOAT * trained_here,
        'key/value cache': 2
        * sizes.layers
        * sizes.kv_width
        * b
        * sizes.batch
        * (sizes.prompt * (1 + copies) + sizes.group * sizes.tokens),
        'activations, checkpoints': sizes.layers * sizes.width * b * rows,
        'activations, one layer or logits': max(one_layer, logits),
        'SAM 2 features': _sam_features(sizes),
    }


def predict_rollout(sizes: Sizes, gpus: int) -> dict[str, int]:
    """Bytes on one GPU by part while rollouts last, under ZeRO-3 with ``gather_for_rollout``.

    Neither gradients nor activations of a pass with gradients are there yet. What a layer takes
    without one is counted as what it takes with one, which is more.

    Args:
        sizes: See `Sizes`.
        gpus: W, ranks.
    """
    parts = predict(sizes, gpus, 3)
    kept = {name: size for name, size in parts.items() if name not in _NOT_IN_A_ROLLOUT}
    kept['language model put together'] = sizes.bytes * sizes.language
    return kept


def fits_whole(sizes: Sizes, gpus: int, room: float) -> bool:
    """Whether ``gather_for_rollout`` is to be chosen: the whole language model has room.

    Args:
        sizes: See `Sizes`.
        gpus: W, ranks.
        room: Bytes of each GPU, of which `MARGIN` is left free.
    """
    return sum(predict_rollout(sizes, gpus).values()) + MARGIN <= room


def _held(count: int, small: int, gpus: int) -> float:
    """Parameters that a rank holds of so many: small ones, which it also has a part of, and parts
    of the others."""
    return small + count / gpus


def _sam_features(sizes: Sizes) -> int:
    """The features kept for the step: three levels of 256, 64 and 32 channels."""
    cells = (sizes.grounding // 16) ** 2
    return int(sizes.batch * FLOAT * cells * (256 + 4 * 64 + 16 * 32))


def read_sizes(
    config: Any, batch: int | None = None, group: int | None = None, tokens: int | None = None
) -> Sizes:
    """The sizes of a config whose model is built without weights.

    Args:
        config: Of a run.
        batch: Samples per rank. Defaults to the config's.
        group: Rollouts. Defaults to the config's.
        tokens: Longest caption in tokens. Defaults to the config's.
    """
    policy = random_weights(config.model.policy)
    with torch.device('meta'):
        model = MODELS.build(policy)
    return sizes_of(model, config, batch, group, tokens)


def sizes_of(
    model: Any,
    config: Any,
    batch: int | None = None,
    group: int | None = None,
    tokens: int | None = None,
    is_small: Callable[[Tensor], bool] = lambda parameter: parameter.numel() <= PERSISTENT,
) -> Sizes:
    """The sizes of a config and of its policy, which is there.

    Args:
        model: The policy.
        config: See `read_sizes`, likewise ``batch``, ``group`` and ``tokens``.
        is_small: Whether ZeRO-3 leaves a parameter whole. Defaults to the threshold of
            configs/deepspeed/zero3.json.
    """
    llm = model.language_model.config
    counts, small = {True: 0, False: 0}, {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
        if is_small(parameter):
            small[parameter.requires_grad] += parameter.numel()
    layers = quantized_layers(model).values()
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    objective = config.model.objective
    heads = llm.num_attention_heads
    vision = model.config['vision_config']
    cells = (vision['image_size'] // vision['patch_size'] * model.config['downsample_ratio']) ** 2
    wrapper = config.optim_wrapper.type if 'optim_wrapper' in config else ''
    return Sizes(
        frozen=counts[False],
        trained=counts[True],
        bytes=model.torch_dtype.itemsize,
        layers=llm.num_hidden_layers,
        width=llm.hidden_size,
        inner=llm.intermediate_size,
        heads=heads,
        kv_width=llm.hidden_size // heads * getattr(llm, 'num_key_value_heads', heads),
        vocabulary=llm.vocab_size,
        chunk=CHUNK_SIZE,
        grounding=model.grounding_encoder.image_size,
        # The image, a region of a quarter of it, and some 60 tokens of text.
        prompt=int(cells * 1.25) + 60,
        batch=batch or config.train_dataloader.batch_size,
        group=group or objective.get('num_generations', 1),
        tokens=tokens or config.model.get('max_new_tokens', 128),
        autocast=str(getattr(wrapper, '__name__', wrapper)).startswith('Amp'),
        rounded=sum(rows * columns for rows, columns in shapes),
        rounded_bytes=sum(packed_bytes(*shape, model.quantization) for shape in shapes),
        largest=max((rows * columns for rows, columns in shapes), default=0),
        small_frozen=small[False],
        small_trained=small[True],
        language=sum(p.numel() for p in model.language_model.parameters() if not is_small(p)),
    )


def random_weights(policy: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's config with its checkpoint's sizes instead of the checkpoint, and a tokenizer.

    A published Sa2VA does not have to be downloaded for that; its sizes are part of this package.
    """
    folder = policy.get('pretrained')
    sizes = complete_sizes(None if folder is None else sizes_folder(folder), policy)
    tokenizer = {'tokenizer': 'llava_sam2_rl://assets/sa2va_tiny'}
    return {**tokenizer, **policy, **sizes, 'pretrained': None}
