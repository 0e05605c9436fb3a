"""The InternVL half of Sa2VA: InternViT features, the projector, the language model.

The parts are xtuner's `InternVisionModel`, transformers' Qwen2 and Phi-3 and xtuner's InternLM2;
what stands here is how Sa2VA joins them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import PreTrainedModel
from xtuner._lite.modelings.internlm2 import InternLM2Config, InternLM2ForCausalLM
from xtuner._lite.modelings.internvl2 import InternVisionModel
from xtuner._lite.modelings.internvl2.configuration_intern_vit import InternVisionConfig

from projects.llava_sam2_rl.registry import nearest


class InternLM2(InternLM2ForCausalLM, GenerationMixin):
    """InternLM2 that transformers 4.48 can generate with.

    xtuner's class prepares its inputs for an older cache interface; transformers' own method does
    what every current model does. Parameters and forward are xtuner's.
    """

    _supports_cache_class = True
    prepare_inputs_for_generation = GenerationMixin.prepare_inputs_for_generation


#: Architecture name of `llm_config` -> (config class, model class).
LANGUAGE_MODELS: dict[str, tuple[type, type[PreTrainedModel]]] = {
    'Qwen2ForCausalLM': (Qwen2Config, Qwen2ForCausalLM),
    'Phi3ForCausalLM': (Phi3Config, Phi3ForCausalLM),
    'InternLM2ForCausalLM': (InternLM2Config, InternLM2),
}

#: The linear layers that the official recipe adapts with LoRA, by architecture.
LORA_TARGETS: dict[str, list[str]] = {
    'Qwen2ForCausalLM': [
        *('q_proj', 'k_proj', 'v_proj', 'o_proj'),
        *('gate_proj', 'up_proj', 'down_proj'),
    ],
    'Phi3ForCausalLM': ['qkv_proj', 'o_proj', 'gate_up_proj', 'down_proj'],
    'InternLM2ForCausalLM': ['wqkv', 'wo', 'w1', 'w2', 'w3'],
}


def architecture(llm_config: dict) -> str:
    """The one architecture that ``llm_config`` names.

    Raises:
        ValueError: None is named, or one that is not supported.
    """
    names = llm_config.get('architectures') or []
    if len(names) != 1:
        raise ValueError(f'llm_config.architectures must name one architecture, got {names}')
    if names[0] not in LANGUAGE_MODELS:
        raise ValueError(
            f'language model {names[0]!r} is not supported: '
            f'{nearest(names[0], list(LANGUAGE_MODELS))}'
        )
    return names[0]


def build_language_model(llm_config: dict) -> PreTrainedModel:
    """Builds the language model of ``llm_config`` (a `config.json` section) with random weights."""
    config_class, model_class = LANGUAGE_MODELS[architecture(llm_config)]
    values = copy.deepcopy(dict(llm_config))
    # These choose code or kernels, not the model; the first would ask for remote code.
    for key in ('auto_map', '_attn_implementation', 'attn_implementation', 'torch_dtype'):
        values.pop(key, None)
    config = config_class(**values)
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        # Phi-3's default (32 000) lies outside a smaller vocabulary, which nn.Embedding refuses.
        config.pad_token_id = None
    if model_class is InternLM2:
        config.attn_implementation = 'eager'
    else:
        config._attn_implementation = 'sdpa'
    return model_class(config)


def build_vision_model(vision_config: dict) -> InternVisionModel:
    """Builds InternViT from ``vision_config`` (a `config.json` section) with random weights."""
    values = {k: v for k, v in vision_config.items() if k not in ('auto_map', 'torch_dtype')}
    values['use_flash_attn'] = False
    return InternVisionModel(InternVisionConfig(**values))


def build_projector(vit_width: int, llm_width: int, downsample_ratio: float) -> nn.Sequential:
    """``mlp1``: from pixel-shuffled ViT features to the language model's width."""
    width = vit_width * int(1 / downsample_ratio) ** 2
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, llm_width),
        nn.GELU(),
        nn.Linear(llm_width, llm_width),
    )


def pixel_shuffle(x: Tensor, ratio: float = 0.5, version: str = 'v2') -> Tensor:
    """Trades resolution for channels, as InternVL does.

    Args:
        x: ``(T, h, w, C)``.
        ratio: Factor on both sides; 0.5 makes four times as many channels.
        version: ``'v2'``; ``'v1'`` leaves rows and columns swapped, as the first InternVL did.

    Returns:
        ``(T, h·ratio, w·ratio, C / ratio²)``.
    """
    t, h, w, c = x.shape
    x = x.reshape(t, h, int(w * ratio), int(c / ratio))
    x = x.transpose(1, 2)
    x = x.reshape(t, int(w * ratio), int(h * ratio), int(c / (ratio * ratio)))
    return x if version == 'v1' else x.transpose(1, 2).contiguous()


def vit_features(
    vision_model: InternVisionModel,
    pixel_values: Tensor,
    *,
    select_layer: int = -1,
    downsample_ratio: float = 0.5,
    ps_version: str = 'v2',
) -> Tensor:
    """InternViT features before the projector.

    Args:
        vision_model: InternViT.
        pixel_values: ``(T, 3, S, S)`` float tiles, ImageNet-normalised.
        select_layer: Which hidden state; -1 is the last.
        downsample_ratio: See `pixel_shuffle`.
        ps_version: See `pixel_shuffle`.

    Returns:
        ``(T, L, C)``: L tokens a tile (256 for 448 px), class token dropped.
    """
    last = select_layer == -1
    out = vision_model(pixel_values=pixel_values, output_hidden_states=not last, return_dict=True)
    x = out.last_hidden_state if last else out.hidden_states[select_layer]
    x = x[:, 1:]
    side = int(x.shape[1] ** 0.5)
    x = x.reshape(len(x), side, side, -1)
    return pixel_shuffle(x, downsample_ratio, ps_version).flatten(1, 2)


def image_tokens(
    tiles: Tensor,
    vp_mask: Sequence[bool] | Tensor | None,
    prompt_masks: Tensor | None,
    cell_weights: Tensor | None = None,
) -> Tensor:
    """The embeddings that fill one sample's ``<IMG_CONTEXT>`` positions, in text order.

    Args:
        tiles: ``(T, L, C)`` projected tile embeddings of the sample.
        vp_mask: T flags, true where regions are pooled from that tile; ``None`` for no regions.
        prompt_masks: ``(R, h, w)`` bool with ``h·w = L``: the regions' cells.
        cell_weights: ``(R, h, w)`` factors of the regions' cells; ``None`` = 1.

    Returns:
        ``(T·L + Σ cells, C)``: each tile's tokens, then for a flagged tile each region's cells.
    """
    if vp_mask is None or prompt_masks is None:
        return tiles.flatten(0, 1)
    cells = prompt_masks.to(tiles.device).bool().flatten(1)
    if cells.shape[1] != tiles.shape[1]:
        raise ValueError(
            f'prompt_masks have {cells.shape[1]} cells, a tile has {tiles.shape[1]} tokens: '
            'make them with the grid of this model'
        )
    parts = []
    for tile, has_regions in zip(tiles, vp_mask, strict=True):
        parts.append(tile)
        if has_regions:
            for i, region in enumerate(cells):
                part = tile[region]
                if cell_weights is not None:
                    part = part * cell_weights[i].flatten()[region, None].to(part)
                parts.append(part)
    return torch.cat(parts)
