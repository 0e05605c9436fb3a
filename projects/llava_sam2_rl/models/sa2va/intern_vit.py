"""InternViT (Chen et al. 2023, arXiv:2312.14238), under the official names of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from projects.llava_sam2_rl.registry import nearest

_NORMS: dict[str, type[nn.Module]] = {'layer_norm': nn.LayerNorm, 'rms_norm': LlamaRMSNorm}


@dataclass(frozen=True)
class InternViTConfig:
    """Sizes of InternViT, as in the ``vision_config`` of an official ``config.json``.

    The defaults are the official ones, which are those of InternViT-6B.

    Args:
        hidden_size: C, width.
        num_attention_heads: Heads of an attention layer; divide the width.
        num_hidden_layers: Number of layers.
        intermediate_size: Width inside the MLP of a layer.
        image_size: Side in pixels of the images that the position embeddings are stored for.
        patch_size: Side of a patch in pixels.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_normalization: Whether queries and keys are RMS-normalised, over all heads together.
        hidden_act: Activation of the MLP, by transformers' name.
        norm_type: ``'layer_norm'`` or ``'rms_norm'``.
        layer_norm_eps: Epsilon of all norms.
        initializer_factor: Initial layer scale.
        dropout: Of what an attention layer gives, in training.
        attention_dropout: Of attention weights, in training.
        drop_path_rate: Probability that the last layer is left out for a sample in training
            (Huang et al. 2016, arXiv:1603.09382); falls linearly to 0 at the first.

    Raises:
        ValueError: The heads do not divide the width, or a name is not known.
    """

    hidden_size: int = 3200
    num_attention_heads: int = 25
    num_hidden_layers: int = 48
    intermediate_size: int = 12800
    image_size: int = 224
    patch_size: int = 14
    qkv_bias: bool = False
    qk_normalization: bool = True
    hidden_act: str = 'gelu'
    norm_type: str = 'rms_norm'
    layer_norm_eps: float = 1e-6
    initializer_factor: float = 0.1
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f'vision_config: hidden_size {self.hidden_size} is no multiple of '
                f'num_attention_heads {self.num_attention_heads}'
            )
        for key, known in (('norm_type', list(_NORMS)), ('hidden_act', list(ACT2FN))):
            name = getattr(self, key)
            if name not in known:
                raise ValueError(f'vision_config.{key} {name!r}: {nearest(str(name), known)}')

    @classmethod
    def from_section(cls, vision_config: Mapping[str, Any]) -> InternViTConfig:
        """Out of a ``vision_config``, whose other keys choose code or kernels."""
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in vision_config.items() if key in names})


class InternViT(nn.Module):
    """The vision encoder of InternVL.

    Args:
        config: Sizes.
    """

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)

    def forward(self, pixel_values: Tensor, select_layer: int = -1) -> Tensor:
        """Encodes images.

        Args:
            pixel_values: ``(T, 3, H, W)``, ImageNet-normalised, in the dtype of the weights.
            select_layer: Which of the L + 1 hidden states: 0 is what goes into the first of L
                layers, -1 what comes out of the last. Layers behind it are not computed.

        Returns:
            ``(T, 1 + H·W / patch_size², C)``, the class token first.

        Raises:
            IndexError: There is no such hidden state.
        """
        states = len(self.encoder.layers) + 1
        if not -states <= select_layer < states:
            raise IndexError(
                f'select_layer {select_layer}: InternViT has {states - 1} layers, hence hidden '
                f'states {-states} to {states - 1}'
            )
        return self.encoder(self.embeddings(pixel_values), select_layer % states)


class _Embeddings(nn.Module):
    """From pixels to tokens: patches behind a class token, with their positions."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.grid = config.image_size // patch
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + self.grid**2, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values)
        positions = self._positions(*patches.shape[-2:])
        first = self.class_embedding.expand(len(patches), -1, -1)
        return torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + positions

    def _positions(self, rows: int, columns: int) -> Tensor:
        """``(1, 1 + rows·columns, C)``: interpolated where the image has another size."""
        stored = self.position_embedding
        if (rows, columns) == (self.grid, self.grid):
            return stored
        table = stored[:, 1:].float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        table = F.interpolate(table, (rows, columns), mode='bicubic', align_corners=False)
        return torch.cat([stored[:, :1], table.flatten(2).transpose(1, 2).to(stored.dtype)], dim=1)


class _Encoder(nn.Module):
    """The layers, one behind the other."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        rates = np.linspace(0.0, config.drop_path_rate, config.num_hidden_layers)
        self.layers = nn.ModuleList(_Layer(config, float(rate)) for rate in rates)
        #: Whether the activations of a layer are computed anew in the backward pass.
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, count: int) -> Tensor:
        for layer in self.layers[:count]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # The mode is an argument: the repetition keeps it, whatever the model's is then.
                x = checkpoint(layer, x, self.training, use_reentrant=False)
            else:
                x = layer(x, self.training)
        return x


class _Layer(nn.Module):
    """Attention and MLP, each behind a norm and with a layer scale."""

    def __init__(self, config: InternViTConfig, drop_path_rate: float) -> None:
        super().__init__()
        width, norm = config.hidden_size, _NORMS[config.norm_type]
        self.attn = _Attention(config)
        self.mlp = _MLP(config)
        self.norm1 = norm(width, eps=config.layer_norm_eps)
        self.norm2 = norm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(width))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(width))
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor, training: bool) -> Tensor:
        attended = self.attn(self.norm1(x).to(x.dtype), training) * self.ls1
        x = x + stochastic_depth(attended, self.drop_path_rate, 'row', training)
        changed = self.mlp(self.norm2(x).to(x.dtype)) * self.ls2
        return x + stochastic_depth(changed, self.drop_path_rate, 'row', training)


class _Attention(nn.Module):
    """Of every token to every token."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_dropout, self.dropout = config.attention_dropout, config.dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_normalization:
            self.q_norm = LlamaRMSNorm(width, eps=config.layer_norm_eps)
            self.k_norm = LlamaRMSNorm(width, eps=config.layer_norm_eps)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, training: bool) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(
            self._by_head(self.q_norm(query)),
            self._by_head(self.k_norm(key)),
            self._by_head(value),
            dropout_p=self.attention_dropout if training else 0.0,
        )
        return F.dropout(self.proj(out.transpose(1, 2).flatten(2)), self.dropout, training)

    def _by_head(self, x: Tensor) -> Tensor:
        """``(T, N, C)`` -> ``(T, heads, N, C / heads)``."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class _MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
