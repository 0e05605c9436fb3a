"""The InternVL half of Sa2VA: InternViT features, the projector, the language model.

Language models are transformers' Qwen2, Phi-3 and Llama (as which InternLM2 is built); what stands
here is how Sa2VA joins the parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_utils import PreTrainedModel

from projects.llava_sam2_rl.models.sa2va.intern_vit import InternViT, InternViTConfig
from projects.llava_sam2_rl.models.sa2va.internlm2 import internlm2_config
from projects.llava_sam2_rl.registry import nearest
from projects.llava_sam2_rl.utils.devices import true_places

#: InternLM2's weights go by other names in the official layout: see `internlm2`.
INTERNLM2 = 'InternLM2ForCausalLM'

#: Architecture name of `llm_config` -> (what makes a config of it, model class).
LANGUAGE_MODELS: dict[str, tuple[Callable[..., PretrainedConfig], type[PreTrainedModel]]] = {
    'Qwen2ForCausalLM': (Qwen2Config, Qwen2ForCausalLM),
    'Phi3ForCausalLM': (Phi3Config, Phi3ForCausalLM),
    INTERNLM2: (internlm2_config, LlamaForCausalLM),
}

_SEPARATE = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']

#: The linear layers that the official recipe adapts with LoRA, by architecture.
LORA_TARGETS: dict[str, list[str]] = {
    'Qwen2ForCausalLM': [*_SEPARATE],
    'Phi3ForCausalLM': ['qkv_proj', 'o_proj', 'gate_up_proj', 'down_proj'],
    INTERNLM2: [*_SEPARATE],
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
    make_config, model_class = LANGUAGE_MODELS[architecture(llm_config)]
    values = copy.deepcopy(dict(llm_config))
    # These choose code or kernels, not the model; the first would ask for remote code.
    for key in ('auto_map', '_attn_implementation', 'attn_implementation', 'torch_dtype', 'dtype'):
        values.pop(key, None)
    config = make_config(**values)
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        # Phi-3's default (32 000) lies outside a smaller vocabulary, which nn.Embedding refuses.
        config.pad_token_id = None
    config._attn_implementation = 'sdpa'
    return model_class(config)


def build_vision_model(vision_config: dict) -> InternViT:
    """Builds InternViT from ``vision_config`` (a `config.json` section) with random weights."""
    return InternViT(InternViTConfig.from_section(vision_config))


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
    vision_model: InternViT,
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
        select_layer: Which hidden state; see `InternViT.forward`.
        downsample_ratio: See `pixel_shuffle`.
        ps_version: See `pixel_shuffle`.

    Returns:
        ``(T, L, C)``: L tokens a tile (256 for 448 px), class token dropped.
    """
    x = vision_model(pixel_values=pixel_values, select_layer=select_layer)[:, 1:]
    side = int(x.shape[1] ** 0.5)
    x = x.reshape(len(x), side, side, -1)
    return pixel_shuffle(x, downsample_ratio, ps_version).flatten(1, 2)


def image_tokens(
    tiles: Tensor,
    vp_mask: Sequence[bool] | Tensor | None,
    prompt_masks: Tensor | None,
    cell_weights: Tensor | None = None,
    num_cells: Sequence[int] = (),
) -> Tensor:
    """The embeddings that fill one sample's ``<IMG_CONTEXT>`` positions, in text order.

    Args:
        tiles: ``(T, L, C)`` projected tile embeddings of the sample.
        vp_mask: T flags, true where regions are pooled from that tile; ``None`` for no regions.
        prompt_masks: ``(R, h, w)`` bool with ``h·w = L``: the regions' cells.
        cell_weights: ``(R, h, w)`` factors of the regions' cells; ``None`` = 1.
        num_cells: R numbers of cells, so that a GPU need not be asked for them.

    Returns:
        ``(T·L + Σ cells, C)``: the tiles' tokens, then each region's cells in the flagged tile.
        (The official code has them right behind that tile, and flags the last one.)
    """
    if vp_mask is None or prompt_masks is None:
        return tiles.flatten(0, 1)
    cells = prompt_masks.to(tiles.device).bool().flatten(1)
    if cells.shape[1] != tiles.shape[1]:
        raise ValueError(
            f'prompt_masks have {cells.shape[1]} cells, a tile has {tiles.shape[1]} tokens: '
            'make them with the grid of this model'
        )
    parts = [tiles.flatten(0, 1)]
    for tile, has_regions in zip(tiles, vp_mask, strict=True):
        if has_regions:
            for i, (region, count) in enumerate(zip(cells, num_cells, strict=True)):
                places = true_places(region, count)
                part = tile[places]
                if cell_weights is not None:
                    part = part * cell_weights[i].flatten()[places, None].to(part)
                parts.append(part)
    return torch.cat(parts)
