"""`Sa2VANetwork`: the parts of Sa2VA under their official names, and the passes of each.

Nothing here knows of checkpoints, adapters or losses over a batch; `model` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from projects.llava_sam2_rl.engine.split_weights import WholeWeights
from projects.llava_sam2_rl.models.decode_graph import DecodeGraphs
from projects.llava_sam2_rl.models.prefix_tree import TreeMask
from projects.llava_sam2_rl.models.sa2va import language
from projects.llava_sam2_rl.models.sa2va.building import (
    build_text_hidden_fcs,
    dtype_of,
    parts_of,
)
from projects.llava_sam2_rl.models.sa2va.features import ImageFeatures, encode_images
from projects.llava_sam2_rl.models.sa2va.grounding import GroundingEncoder, SamFeatures
from projects.llava_sam2_rl.models.sa2va.internvl import (
    build_language_model,
    build_projector,
    build_vision_model,
)
from projects.llava_sam2_rl.models.sa2va.official_batch import (
    left_padded,
    prompt_masks_of_sequences,
)
from projects.llava_sam2_rl.models.sa2va.packed_attention import PackedAttention
from projects.llava_sam2_rl.models.sa2va.propagation import NUM_COND_FRAMES, propagate
from projects.llava_sam2_rl.models.sa2va.vocabulary import (
    add_missing_tokens,
    find_special_tokens,
)
from projects.llava_sam2_rl.prompts import IMG_CONTEXT, SEG, ChatTemplate, find_template
from projects.llava_sam2_rl.utils.devices import indices_on, true_places


class Sa2VANetwork(BaseModel):
    """InternViT, a projector and a language model; SAM 2, prompted by what ``[SEG]`` became.

    Args:
        config: In the format of the official ``config.json``; its ``llm_config.vocab_size`` follows
            where embeddings are added for special tokens.
        dtype: Of the weights, which are random.
        tokenizer: Special tokens that it lacks are added.
        special_token_ids: Token -> id; overrides the tokenizer.
        pretrained: Folder of the checkpoint that will be loaded, where there is one: then no
            embeddings are added.
        attention: See `PackedAttention`. Defaults to ``'auto'``.
        decode_graphs: See `DecodeGraphs`. Defaults to ``'auto'``.
    """

    def __init__(
        self,
        config: dict[str, Any],
        dtype: torch.dtype,
        tokenizer: PreTrainedTokenizerBase | None = None,
        special_token_ids: Mapping[str, int] | None = None,
        pretrained: str | None = None,
        attention: str = 'auto',
        decode_graphs: str = 'auto',
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        #: Puts weights together that a rank keeps a part of; replaced where there are such.
        self.weights = WholeWeights()
        self.packed_attention = PackedAttention(attention)
        self.decode_graphs = DecodeGraphs(decode_graphs)
        with parts_of(dtype):
            self.vision_model = build_vision_model(config['vision_config'])
            self.language_model = build_language_model(config['llm_config'])
            width = self.language_model.config.hidden_size
            self.mlp1 = build_projector(
                config['vision_config']['hidden_size'], width, config['downsample_ratio']
            )
            self.grounding_encoder = GroundingEncoder(config.get('grounding_encoder_config'))
            self.text_hidden_fcs = build_text_hidden_fcs(width, self.grounding_encoder.hidden_dim)
        if tokenizer is not None:
            add_missing_tokens(tokenizer, self.language_model, config['llm_config'], pretrained)
        rows = self.language_model.get_input_embeddings().num_embeddings
        self.special_token_ids = find_special_tokens(special_token_ids, tokenizer, rows)

    def use_weights(self, weights: WholeWeights) -> None:
        """Takes what puts weights together that lie in parts.

        Raises:
            ValueError: A table of SAM 2 is in parts, which it reads without calling the module.
        """
        tables = [x.weight for x in self.grounding_encoder.modules() if type(x) is nn.Embedding]
        split = [table.numel() for table in tables if weights.is_split(table)]
        if split:
            raise ValueError(
                f'ZeRO-3 would split tables of SAM 2 of {max(split)} elements, which have to stay '
                'whole: raise zero_optimization.stage3_param_persistence_threshold to that at '
                'least (configs/deepspeed/zero3.json has 4000000)'
            )
        self.weights = weights

    # -------------------------------------------------------------- properties

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.parameters()).device

    @property
    def image_token_id(self) -> int:
        """Id of ``<IMG_CONTEXT>``."""
        return self.special_token_ids[IMG_CONTEXT]

    @property
    def seg_token_id(self) -> int:
        """Id of ``[SEG]``."""
        return self.special_token_ids[SEG]

    @property
    def template(self) -> str:
        """Name of the chat template: ``template`` of ``config.json``."""
        return self.chat_template.name

    @property
    def chat_template(self) -> ChatTemplate:
        """The strings around every question and answer."""
        return find_template(self.config['template'])

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer: the template's; none where no tokenizer decodes them."""
        return () if self.tokenizer is None else self.chat_template.stop_strings

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one tile: 256 for 448 px."""
        return self.grid_size**2

    @property
    def grid_size(self) -> int:
        """Side of the token grid, which is also that of ``prompt_masks``."""
        patches = self.config['force_image_size'] // self.config['vision_config']['patch_size']
        return int(patches * self.config['downsample_ratio'])

    @property
    def pad_token_id(self) -> int:
        """Id used for padding: the tokenizer's, else the language model's, else 0."""
        if self.tokenizer is not None and self.tokenizer.pad_token_id is not None:
            return self.tokenizer.pad_token_id
        return self.language_model.config.pad_token_id or 0

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends a sequence, where there is one."""
        if self.tokenizer is not None:
            return self.tokenizer.eos_token_id
        return self.language_model.config.eos_token_id

    @property
    def _decoder(self) -> nn.Module:
        return language.decoder_of(self.language_model)

    @property
    def lm_head(self) -> Any:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    # ------------------------------------------------------------------ images

    def encode_images(self, data: Mapping[str, Any], grounding: bool = True) -> ImageFeatures:
        """Runs the encoders, once for every image of ``data``.

        Args:
            data: ``pixel_values``: list of ``(T, 3, S, S)`` (or one tensor ``(N, 3, S, S)``, a tile
                each); ``vp_overall_mask``: ``(ΣT,)`` bool or absent; ``g_pixel_values``: list of
                ``(3, s, s)`` or absent.
            grounding: Whether SAM 2's encoder runs too. Defaults to True.
        """
        grounding_encoder = self.grounding_encoder if grounding else None
        return encode_images(self.vision_model, grounding_encoder, self.config, data)

    def project(self, features: ImageFeatures) -> Tensor:
        """Applies the projector: ``(ΣT, L, C)`` -> ``(ΣT, L, D)`` in the language model's dtype."""
        tiles = self.mlp1(features.vit.to(dtype_of(self.mlp1)))
        return tiles.to(dtype_of(self.language_model.get_input_embeddings()))

    # ---------------------------------------------------------------- language

    def embed(
        self,
        input_ids: Tensor,
        features: ImageFeatures,
        *,
        prompt_masks: Sequence[Tensor | None] | None = None,
        image_index: Sequence[int] | None = None,
        sample_ids: Sequence[str] | None = None,
        tiles: Tensor | None = None,
        cell_weights: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Token embeddings with image and region embeddings in their places.

        Args:
            input_ids: ``(B, N)`` int64.
            features: Of the images.
            prompt_masks: For each sequence ``(R, h, w)`` bool or ``None``.
            image_index: Image of each sequence; default one each, in order.
            sample_ids: For error messages.
            tiles: ``project(features)``, where it is at hand already.
            cell_weights: For each sequence ``(R, h, w)``: factors of its regions' embeddings.

        Returns:
            ``(B, N, D)``.

        Raises:
            ValueError: A sequence has another number of ``<IMG_CONTEXT>`` than of embeddings.
        """
        return language.fill_image_tokens(
            self.language_model.get_input_embeddings()(input_ids),
            input_ids == self.image_token_id,
            self.project(features) if tiles is None else tiles,
            features,
            prompt_masks=prompt_masks,
            image_index=image_index,
            sample_ids=sample_ids,
            cell_weights=cell_weights,
        )

    def hidden_states(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | TreeMask,
        position_ids: Tensor | None = None,
        key_weights: Tensor | None = None,
    ) -> Tensor:
        """Last hidden state ``(B, N, D)``, without the head.

        Activation checkpointing, where it is on, works in eval mode too: what needs a gradient and
        no dropout (GRPO) would not fit otherwise.

        Args:
            inputs_embeds: ``(B, N, D)``.
            attention_mask: ``(B, N)`` bool, padding on either side; or ``(B, N, N)`` bool: which
                positions (the last axis) each one sees; or the same as a tree.
            position_ids: ``(B, N)`` int64; default counts the attended positions. Needed with the
                second kind of mask.
            key_weights: ``(B, N)`` in (0, 1]: what each position counts for in the softmax of the
                attention of all that come behind it; a gradient flows to it.
        """
        mask: Any = attention_mask
        if isinstance(mask, TreeMask):
            mask = self.packed_attention.mask(self.language_model, mask, inputs_embeds)
        return language.hidden_states(
            self.language_model, inputs_embeds, mask, position_ids, key_weights
        )

    def forward_with_cache(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
    ) -> BaseModelOutputWithPast:
        """The language model without its head, behind what ``past_key_values`` holds.

        Args:
            inputs_embeds: ``(B, N, D)``, the new positions.
            attention_mask: ``(B, P + N)`` int64 over past and new positions; or, added to the
                scores, ``(B, 1, Q, S)`` as the cache's attention wants it.
            position_ids: ``(B, N)`` int64.
            past_key_values: Of P positions; grows by N in place. Gradients flow through it.
        """
        return language.forward_with_cache(
            self.language_model, inputs_embeds, attention_mask, position_ids, past_key_values
        )

    def caption_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean next-token cross-entropy of ``(B, N, D)`` over the labels that are not -100."""
        return language.caption_loss(self.lm_head, hidden, labels)

    # ------------------------------------------------------------ segmentation

    def seg_embeddings(self, hidden: Tensor, input_ids: Tensor) -> tuple[Tensor, list[int]]:
        """Projected hidden states at ``[SEG]``.

        Args:
            hidden: ``(B, N, D)``.
            input_ids: ``(B, N)``.

        Returns:
            ``(P, 256)`` in order of the text, and how many belong to each sequence.
        """
        at_seg = input_ids == self.seg_token_id
        counts = at_seg.sum(dim=1).tolist()
        states = hidden.flatten(0, 1)[true_places(at_seg.flatten(), sum(counts))]
        return self.text_hidden_fcs(states.to(dtype_of(self.text_hidden_fcs))), counts

    def generated_seg_embeddings(
        self, data: Mapping[str, Any], new_ids: Tensor
    ) -> tuple[Tensor, list[int]]:
        """Embeddings of the ``[SEG]`` that B sequences got when they were continued.

        Args:
            data: As in `VideoLLaVASAMModel.generate`, with ``features``.
            new_ids: ``(B, T_new)``, what `generate` returned.

        Returns:
            ``(P, 256)`` in order of the texts, and how many belong to each sequence.
        """
        prompt_ids, prompt_mask = left_padded(data, self.pad_token_id)
        ids = torch.cat([prompt_ids, new_ids], dim=1)
        mask = torch.cat([prompt_mask, new_ids != self.pad_token_id], dim=1)
        at_seg = mask & (ids == self.seg_token_id)
        at_seg[:, : prompt_ids.shape[1]] = False
        if not at_seg.any():
            return new_ids.new_zeros(0, self.grounding_encoder.hidden_dim).float(), [0] * len(ids)
        regions = prompt_masks_of_sequences(data, data['features'])
        embeds = self.embed(
            ids, data['features'], prompt_masks=regions, image_index=data.get('image_index')
        )
        hidden = self.hidden_states(embeds, mask)
        return self.seg_embeddings(hidden, torch.where(at_seg, ids, -1))

    def segment(
        self, prompts: Tensor, features: ImageFeatures, image_index: Sequence[int] | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One mask per prompt; see `GroundingEncoder.decode`."""
        if features.sam is None:
            raise ValueError('the batch has [SEG] but no g_pixel_values')
        if not isinstance(image_index, Tensor):
            image_index = indices_on(prompts.device, image_index)
        index = image_index.to(prompts.device, torch.long)
        return self.grounding_encoder.decode(features.sam, prompts, index)

    def propagate(
        self,
        frames: Tensor | Iterable[Tensor | SamFeatures],
        seg_embeddings: Tensor,
        num_cond_frames: int = NUM_COND_FRAMES,
        memory_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Masks of O objects in the F frames of a clip, by SAM 2's memory.

        Args:
            frames: ``(F, 3, s, s)`` uint8 RGB, or an iterator of ``(3, s, s)`` or of what the
                encoder knows of a frame.
            seg_embeddings: ``(O, 256)``, as `seg_embeddings` gives them.
            num_cond_frames: How many of the first frames the embeddings prompt. Defaults to 5.
            memory_dtype: To which memories are rounded; officially bfloat16, the default.

        Returns:
            ``(O, F, s/4, s/4)`` float32 logits. `propagation.propagate_frames` gives them frame by
            frame, for clips that are long.
        """
        return propagate(
            self.grounding_encoder, frames, seg_embeddings, num_cond_frames, memory_dtype
        )
