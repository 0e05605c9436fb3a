"""The language model's side: image embeddings among the words, passes with and without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from projects.llava_sam2_rl.models.sa2va.features import ImageFeatures
from projects.llava_sam2_rl.models.sa2va.internvl import image_tokens
from projects.llava_sam2_rl.models.sa2va.official_batch import sample_name
from projects.llava_sam2_rl.models.sa2va.packed_attention import added_to_scores
from projects.llava_sam2_rl.models.transformers_compat import (
    cache_argument,
    enable_checkpointing_of,
)
from projects.llava_sam2_rl.prompts import IMG_CONTEXT
from projects.llava_sam2_rl.utils.devices import to_host


def decoder_of(language_model: PreTrainedModel) -> Any:
    """The language model without its head (LoRA layers included)."""
    has_adapters = isinstance(language_model, PeftModel)
    return (language_model.get_base_model() if has_adapters else language_model).model


def fill_image_tokens(
    embeds: Tensor,
    selected: Tensor,
    tiles: Tensor,
    features: ImageFeatures,
    *,
    prompt_masks: Sequence[Tensor | None] | None = None,
    image_index: Sequence[int] | None = None,
    sample_ids: Sequence[str] | None = None,
    cell_weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Puts image and region embeddings in their places; see `VideoLLaVASAMModel.embed`.

    Args:
        embeds: ``(B, N, D)`` of the tokens.
        selected: ``(B, N)`` bool: the places of ``<IMG_CONTEXT>``.
        tiles: ``(ΣT, L, D)`` projected tiles.
        features: Of the images.
        prompt_masks: For each sequence ``(R, h, w)`` bool or ``None``.
        image_index: Image of each sequence; default one each, in order.
        sample_ids: For error messages.
        cell_weights: For each sequence ``(R, h, w)``: factors of its regions' embeddings.
    """
    batch = len(embeds)
    image_index = range(batch) if image_index is None else image_index
    if len(image_index) != batch:
        raise ValueError(f'{batch} sequences, but {len(image_index)} images')
    given = [] if prompt_masks is None else [x for x in prompt_masks if x is not None]
    cells = [x.to(embeds.device).bool().flatten(1).sum(1) for x in given]
    places, *per_region = (x.tolist() for x in to_host([selected.sum(dim=1), *cells]))
    regions_cells = iter(per_region)
    parts = []
    for i, image in enumerate(image_index):
        span = features.tiles_of(image)
        masks = None if prompt_masks is None else prompt_masks[i]
        vp_mask = None if features.vp_flags is None else features.vp_flags[span]
        weights = None if cell_weights is None else cell_weights[i]
        num_cells = () if masks is None else next(regions_cells)
        tokens = image_tokens(tiles[span], vp_mask, masks, weights, num_cells)
        if len(tokens) != places[i]:
            raise ValueError(
                f'sample {sample_name(sample_ids, i)}: {places[i]} {IMG_CONTEXT} tokens in the '
                f'text, {len(tokens)} image embeddings'
            )
        parts.append(tokens)
    return embeds.masked_scatter(
        selected.unsqueeze(-1).expand_as(embeds), torch.cat(parts).to(embeds.dtype)
    )


def hidden_states(
    language_model: PreTrainedModel,
    inputs_embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None = None,
    key_weights: Tensor | None = None,
) -> Tensor:
    """``(B, N, D)`` by a pass without a cache; see `VideoLLaVASAMModel.hidden_states`."""
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    dtype = inputs_embeds.dtype
    if isinstance(attention_mask, BlockMask):
        pass  # as FlexAttention takes it
    elif key_weights is not None:
        attention_mask = _weighted_causal_mask(attention_mask, key_weights, dtype)
    elif attention_mask.ndim == 3:
        attention_mask = added_to_scores(attention_mask, dtype)
    else:
        attention_mask = attention_mask.long()
    decoder = decoder_of(language_model)
    with _checkpointed(decoder):
        return decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state


def forward_with_cache(
    language_model: PreTrainedModel,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    past_key_values: Cache,
) -> BaseModelOutputWithPast:
    """A pass behind what a cache holds; see `VideoLLaVASAMModel.forward_with_cache`."""
    decoder = decoder_of(language_model)
    return decoder(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        return_dict=True,
        **cache_argument(decoder, past_key_values),
    )


def caption_loss(lm_head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token cross-entropy over the labels that are not -100.

    Only supervised positions go through the head: the full ``(B, N, V)`` logits are never made.

    Args:
        lm_head: Of the language model.
        hidden: ``(B, N, D)``.
        labels: ``(B, N)`` int64, not shifted.
    """
    target = labels[:, 1:]
    keep = target != -100
    if not keep.any():
        return hidden.sum() * 0.0
    logits = lm_head(hidden[:, :-1][keep]).float()
    return F.cross_entropy(logits, target[keep])


def _weighted_causal_mask(
    attention_mask: Tensor, key_weights: Tensor, dtype: torch.dtype
) -> Tensor:
    """``(B, 1, N, N)``, added to the scores: log weight of a key, or the lowest number."""
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    allowed = causal & attention_mask.bool()[:, None]
    scores = key_weights.log().to(dtype)[:, None].expand(-1, length, -1)
    return scores.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


# ------------------------------------------------------------------------- activation checkpointing


def enable_checkpointing(language_model: PreTrainedModel) -> None:
    """Has the activations of its layers recomputed in the backward pass."""
    layers = decoder_of(language_model).layers
    enable_checkpointing_of(
        language_model, {'use_reentrant': False, 'context_fn': partial(_same_mode, layers)}
    )
    language_model.enable_input_require_grads()


@contextmanager
def _checkpointed(decoder: Any) -> Iterator[None]:
    """Transformers checkpoint what is in training mode only.

    At first the decoder looked at its own flag; from 4.52 on each layer looks at its own. Neither
    uses it for anything else: what is inside the layers, dropout with it, keeps its mode.
    """
    looking = []
    if torch.is_grad_enabled() and getattr(decoder, 'gradient_checkpointing', False):
        looking = [module for module in (decoder, *decoder.layers) if not module.training]
    for module in looking:
        module.training = True
    try:
        yield
    finally:
        for module in looking:
            module.training = False


def _same_mode(layers: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a checkpoint's forward and of its repetition in the backward pass."""
    return nullcontext(), _InMode(layers, layers.training)


class _InMode:
    """Inside the scope, a module is in training mode or not.

    The repetition of a checkpointed layer needs the dropout of the first time, whatever mode the
    model is in by then. May be entered again: a graph that is retained is walked several times.
    """

    def __init__(self, module: nn.Module, training: bool) -> None:
        self.module, self.training = module, training

    def __enter__(self) -> None:
        self._before = self.module.training
        if self._before != self.training:
            self.module.train(self.training)

    def __exit__(self, *_: Any) -> None:
        if self._before != self.training:
            self.module.train(self._before)
