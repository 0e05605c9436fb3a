"""`VideoLLaVASAMModel`: Sa2VA from well-kept parts, in the official checkpoint layout."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoTokenizer, Cache, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from projects.llava_sam2_rl.losses.mask import mask_loss
from projects.llava_sam2_rl.models.generation import Sampling, no_gradient, sample_completions
from projects.llava_sam2_rl.models.sa2va.checkpoint import (
    load_official,
    load_xtuner,
    merged_state,
    save_official,
)
from projects.llava_sam2_rl.models.sa2va.grounding import GroundingEncoder, SamFeatures
from projects.llava_sam2_rl.models.sa2va.internvl import (
    LORA_TARGETS,
    architecture,
    build_language_model,
    build_projector,
    build_vision_model,
    image_tokens,
    vit_features,
)
from projects.llava_sam2_rl.prompts import (
    SPECIAL_TOKENS,
    TEMPLATE_STOP_STRINGS,
    add_special_tokens,
    clean_caption,
)
from projects.llava_sam2_rl.registry import MODELS, nearest
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.pretrained import SIZES, complete_sizes, read_config, resolve

IMG_CONTEXT = '<IMG_CONTEXT>'
SEG = '[SEG]'

#: What can be trained; the official recipe trains `OFFICIAL_TRAINABLE`.
PARTS = (
    'vision_model',
    'mlp1',
    'language_model',
    'lora',
    'text_hidden_fcs',
    'mask_decoder',
    'grounding_encoder',
)
OFFICIAL_TRAINABLE = ('mlp1', 'lora', 'text_hidden_fcs', 'mask_decoder')


@dataclass(frozen=True)
class ImageFeatures:
    """What the frozen encoders know of N images; shared by every pass over them.

    Args:
        vit: ``(ΣT, L, C)`` InternViT features of all tiles before the (trainable) projector.
        num_tiles: Tiles of each image; sums to ΣT.
        vp_mask: ``(ΣT,)`` bool, the tile of each image that regions are pooled from.
        sam: SAM 2's features of the N images, or ``None`` where no mask is wanted.
    """

    vit: Tensor
    num_tiles: tuple[int, ...]
    vp_mask: Tensor | None
    sam: SamFeatures | None

    def __len__(self) -> int:
        return len(self.num_tiles)


@MODELS.register_module()
class VideoLLaVASAMModel(BaseModel):
    """Sa2VA: InternVL that talks about images, SAM 2 that segments what ``[SEG]`` points to.

    Args:
        vision_config: InternViT sizes, as in the official ``config.json``. Defaults to those of
            ``pretrained``, as do all options down to ``downsample_ratio``.
        llm_config: Language model sizes, as there; ``architectures`` names one of
            Qwen2ForCausalLM, Phi3ForCausalLM, InternLM2ForCausalLM.
        grounding_encoder_config: SAM 2 sizes. Where neither says, Hiera-L at 1024 px.
        template: Name of the chat template, one of xtuner's ``PROMPT_TEMPLATE``; says where an
            answer ends. Where neither says, ``'phi3_chat'``.
        select_layer: ViT layer whose output is used. Where neither says, -1.
        ps_version: Pixel shuffle version. Where neither says, ``'v2'``.
        force_image_size: Side of a tile in pixels. Where neither says, 448.
        downsample_ratio: Pixel shuffle ratio. Where neither says, 0.5.
        tokenizer: A tokenizer, a folder with one, or ``None``: then the one in ``pretrained``, and
            where there is none ``special_token_ids`` is needed.
        special_token_ids: Token -> id, at least ``<IMG_CONTEXT>`` and ``[SEG]``; overrides the
            tokenizer.
        pretrained: Folder in the official layout whose weights are loaded.
        checkpoint: A training checkpoint of the official recipe (xtuner ``.pth``), loaded last.
        lora: Options of `peft.LoraConfig`; ``target_modules`` defaults to the official recipe's.
            ``None`` for no adapter.
        trainable: Which of `PARTS` are trained; all else is frozen.
        torch_dtype: Dtype of the frozen weights and of what `save_pretrained` writes; trained
            weights are kept in float32 (DeepSpeed casts them itself and keeps float32 masters).
        gradient_checkpointing: Recompute the language model's activations in the backward pass.

    Raises:
        CheckpointError: ``pretrained`` or ``checkpoint`` is missing, damaged or does not fit.
        ValueError: An option has no valid value.
    """

    def __init__(
        self,
        vision_config: dict | None = None,
        llm_config: dict | None = None,
        grounding_encoder_config: dict | None = None,
        *,
        template: str | None = None,
        select_layer: int | None = None,
        ps_version: str | None = None,
        force_image_size: int | None = None,
        downsample_ratio: float | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        special_token_ids: Mapping[str, int] | None = None,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        lora: dict | None = None,
        trainable: Sequence[str] = OFFICIAL_TRAINABLE,
        torch_dtype: str | torch.dtype = 'float32',
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        sizes = complete_sizes(
            pretrained,
            {
                'vision_config': vision_config,
                'llm_config': llm_config,
                'grounding_encoder_config': grounding_encoder_config,
                'template': template,
                'select_layer': select_layer,
                'ps_version': ps_version,
                'force_image_size': force_image_size,
                'downsample_ratio': downsample_ratio,
            },
        )
        vision_config, llm_config = sizes['vision_config'], sizes['llm_config']
        template, downsample_ratio = sizes['template'], sizes['downsample_ratio']
        for part in trainable:
            if part not in PARTS:
                raise ValueError(f'trainable names {part!r}: {nearest(part, list(PARTS))}')
        if _template_name(template) not in TEMPLATE_STOP_STRINGS:
            raise ValueError(
                f'template {template!r}: {nearest(template, list(TEMPLATE_STOP_STRINGS))}'
            )
        pretrained = None if pretrained is None else str(resolve(pretrained))
        self.config: dict[str, Any] = {
            'model_type': 'sa2va_chat',
            'architectures': ['Sa2VAChatModel'],
            **sizes,
        }
        dtype = getattr(torch, torch_dtype) if isinstance(torch_dtype, str) else torch_dtype
        self.torch_dtype: torch.dtype = dtype
        self.tokenizer = self._load_tokenizer(tokenizer, pretrained)
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        on_meta = torch.empty(0).is_meta
        try:
            with _SchedulesOnCPU() if on_meta else nullcontext():
                self.vision_model = build_vision_model(vision_config)
                self.language_model = build_language_model(llm_config)
                vit_width = vision_config['hidden_size']
                llm_width = self.language_model.config.hidden_size
                self.mlp1 = build_projector(vit_width, llm_width, downsample_ratio)
                self.grounding_encoder = GroundingEncoder(
                    self.config.get('grounding_encoder_config')
                )
                self.text_hidden_fcs = nn.Sequential(
                    nn.Linear(llm_width, llm_width),
                    nn.ReLU(inplace=True),
                    nn.Linear(llm_width, self.grounding_encoder.hidden_dim),
                    nn.Dropout(0.0),
                )
        finally:
            torch.set_default_dtype(default_dtype)

        self.special_token_ids = self._find_special_tokens(special_token_ids, pretrained)
        if pretrained is not None:
            load_official(self, pretrained)
        if lora is not None:
            self._add_lora(lora)
        if checkpoint is not None:
            names = load_xtuner(self, checkpoint)
            print_log(f'{checkpoint}: {len(names)} tensors loaded', logger='current')
        self._set_trainable(tuple(trainable))
        self.vision_model.encoder.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.language_model.gradient_checkpointing_enable(
                {'use_reentrant': False, 'context_fn': self._same_mode}
            )
            self.language_model.enable_input_require_grads()
        self.language_model.config.use_cache = False

    def init_weights(self) -> None:
        """Nothing: the weights are there once the model is built.

        mmengine's runner calls this before the first step. Its default goes through the children
        to transformers' own ``init_weights``, which draws anew what it did not load itself: the
        LoRA matrices, so that training would start from a model with noise in every layer.
        """
        self._is_init = True

    # ---------------------------------------------------------------- building

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        **overrides: Any,
    ) -> VideoLLaVASAMModel:
        """Builds the model that a folder in the official layout describes, with its weights.

        Args:
            folder: Holds ``config.json``, safetensors or ``.bin`` (sharded or not) and usually a
                tokenizer.
            tokenizer: Overrides the folder's tokenizer.
            **overrides: Any other option of the class (``lora``, ``trainable``, ``torch_dtype``,
                ``special_token_ids``, …).

        Raises:
            CheckpointError: The folder is missing, of another model, damaged, or its keys differ
                from the model's; the message lists them.
        """
        folder = resolve(folder)
        config = read_config(folder)
        options = {key: config[key] for key in SIZES if key in config}
        options.update(overrides)
        model = cls(tokenizer=tokenizer, pretrained=str(folder), **options)
        # Kept whole, so that what was read is written back, entries for other readers included.
        model.config = {**config, **{k: model.config[k] for k in options if k in model.config}}
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the official layout: config, safetensors with LoRA merged, and the tokenizer.

        Args:
            folder: Made where it does not exist.
            dtype: Of the tensors; default the ``torch_dtype`` the model was built with.
        """
        state = merged_state(self)
        dtype = self.torch_dtype if dtype is None else dtype
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        save_official(state, self.config, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))

    @staticmethod
    def _load_tokenizer(
        tokenizer: PreTrainedTokenizerBase | str | None, pretrained: str | None
    ) -> PreTrainedTokenizerBase | None:
        if tokenizer is None and pretrained is not None:
            has_one = (Path(pretrained) / 'tokenizer_config.json').is_file()
            tokenizer = pretrained if has_one else None
        if isinstance(tokenizer, str | Path):
            tokenizer = resolve(tokenizer)
            if not tokenizer.is_dir():
                raise CheckpointError(f'no tokenizer folder {str(tokenizer)!r}')
            tokenizer = AutoTokenizer.from_pretrained(
                str(tokenizer), trust_remote_code=False, local_files_only=True
            )
        return tokenizer

    def _find_special_tokens(
        self, given: Mapping[str, int] | None, pretrained: str | None
    ) -> dict[str, int]:
        rows = self.language_model.get_input_embeddings().num_embeddings
        ids = dict(given or {})
        if self.tokenizer is not None:
            known = self.tokenizer.get_vocab()
            absent = [token for token in SPECIAL_TOKENS if token not in known]
            if absent:
                add_special_tokens(self.tokenizer)
                if len(self.tokenizer) > rows and pretrained is not None:
                    raise CheckpointError(
                        f'{pretrained}: its tokenizer lacks {", ".join(absent)} and its {rows} '
                        'embeddings have no room for them: use a Sa2VA checkpoint with its own '
                        'tokenizer'
                    )
            for token in SPECIAL_TOKENS:
                ids.setdefault(token, self.tokenizer.convert_tokens_to_ids(token))
            if len(self.tokenizer) > rows and pretrained is None:
                self.language_model.resize_token_embeddings(len(self.tokenizer))
                rows = len(self.tokenizer)
                self.config['llm_config']['vocab_size'] = rows
        for token in (IMG_CONTEXT, SEG):
            if token not in ids:
                raise ValueError(
                    f'the id of {token!r} is not known: give a tokenizer, or '
                    f"special_token_ids={{'{IMG_CONTEXT}': …, '{SEG}': …}}"
                )
        for token, index in ids.items():
            if not 0 <= index < rows:
                raise CheckpointError(
                    f'{token!r} has id {index}, the embeddings have {rows} rows: the tokenizer is '
                    'of another checkpoint'
                )
        return ids

    def _add_lora(self, lora: dict) -> None:
        options = {k: v for k, v in dict(lora).items() if k != 'type'}
        options.setdefault('task_type', 'CAUSAL_LM')
        options.setdefault('target_modules', LORA_TARGETS[architecture(self.config['llm_config'])])
        self.language_model = get_peft_model(self.language_model, LoraConfig(**options))

    def _set_trainable(self, parts: tuple[str, ...]) -> None:
        self.requires_grad_(False)
        for part in ('vision_model', 'mlp1', 'language_model', 'text_hidden_fcs'):
            if part in parts:
                getattr(self, part).requires_grad_(True)
        if 'grounding_encoder' in parts:
            self.grounding_encoder.requires_grad_(True)
        if 'mask_decoder' in parts:
            self.grounding_encoder.mask_decoder.requires_grad_(True)
        for name, parameter in self.language_model.named_parameters():
            if '.lora_' in name or '.modules_to_save.' in name:
                parameter.requires_grad_('lora' in parts)
        self._frozen = [
            module
            for part, module in (
                ('vision_model', self.vision_model),
                ('grounding_encoder', self.grounding_encoder.sam2_model.image_encoder),
            )
            if part not in parts
        ]
        # An update of 1e-5 of its value is lost in bfloat16, so what is trained is kept in float32.
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.train(self.training)

    def train(self, mode: bool = True) -> VideoLLaVASAMModel:
        """Sets the training mode; frozen encoders stay in eval mode."""
        super().train(mode)
        for module in getattr(self, '_frozen', ()):
            module.eval()
        return self

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
        """The language model without its head (LoRA layers included)."""
        model = self.language_model
        return (model.get_base_model() if hasattr(model, 'peft_config') else model).model

    @property
    def lm_head(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    # ------------------------------------------------------------------ images

    def encode_images(self, data: Mapping[str, Any], grounding: bool = True) -> ImageFeatures:
        """Runs the encoders, once for every image of ``data``.

        Args:
            data: ``pixel_values``: list of ``(T, 3, S, S)`` (or one tensor ``(N, 3, S, S)``, a tile
                each); ``vp_overall_mask``: ``(ΣT,)`` bool or absent; ``g_pixel_values``: list of
                ``(3, s, s)`` or absent.
            grounding: Whether SAM 2's encoder runs too.
        """
        pixels = [x.unsqueeze(0) if x.ndim == 3 else x for x in data['pixel_values']]
        tiles = torch.cat(list(pixels)).to(self._dtype_of(self.vision_model))
        vp_mask = data.get('vp_overall_mask')
        if vp_mask is not None:
            vp_mask = torch.as_tensor(vp_mask, device=tiles.device).bool().flatten()
            if len(vp_mask) != len(tiles):
                raise ValueError(f'vp_overall_mask has {len(vp_mask)} flags for {len(tiles)} tiles')
        # The official batch gives a text-only sample one tile of zeros.
        real = tiles.flatten(1).any(dim=1)
        counts, start = [], 0
        for x in pixels:
            counts.append(int(real[start : start + len(x)].sum()))
            start += len(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains(self.vision_model)):
            vit = vit_features(
                self.vision_model,
                tiles[real],
                select_layer=self.config['select_layer'],
                downsample_ratio=self.config['downsample_ratio'],
                ps_version=self.config['ps_version'],
            )
        sam = None
        if grounding and data.get('g_pixel_values') is not None:
            encoder = self.grounding_encoder
            trains = self._trains(encoder.sam2_model.image_encoder)
            with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
                sam = encoder.encode(torch.stack(list(data['g_pixel_values'])))
        return ImageFeatures(vit, tuple(counts), None if vp_mask is None else vp_mask[real], sam)

    def project(self, features: ImageFeatures) -> Tensor:
        """Applies the projector: ``(ΣT, L, C)`` -> ``(ΣT, L, D)`` in the language model's dtype."""
        tiles = self.mlp1(features.vit.to(self._dtype_of(self.mlp1)))
        return tiles.to(self._dtype_of(self.language_model.get_input_embeddings()))

    @staticmethod
    def _dtype_of(module: nn.Module) -> torch.dtype:
        return next(module.parameters()).dtype

    @staticmethod
    def _trains(module: nn.Module) -> bool:
        return any(p.requires_grad for p in module.parameters())

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
        batch = len(input_ids)
        image_index = range(batch) if image_index is None else image_index
        if len(image_index) != batch:
            raise ValueError(f'{batch} sequences, but {len(image_index)} images')
        tiles = self.project(features) if tiles is None else tiles
        starts = [0]
        for count in features.num_tiles:
            starts.append(starts[-1] + count)
        embeds = self.language_model.get_input_embeddings()(input_ids)
        selected = input_ids == self.image_token_id
        counts = selected.sum(dim=1).tolist()
        parts = []
        for i, image in enumerate(image_index):
            span = slice(starts[image], starts[image + 1])
            masks = None if prompt_masks is None else prompt_masks[i]
            vp_mask = None if features.vp_mask is None else features.vp_mask[span].tolist()
            weights = None if cell_weights is None else cell_weights[i]
            tokens = image_tokens(tiles[span], vp_mask, masks, weights)
            if len(tokens) != counts[i]:
                raise ValueError(
                    f'sample {_name(sample_ids, i)}: {counts[i]} {IMG_CONTEXT} tokens in the text, '
                    f'{len(tokens)} image embeddings'
                )
            parts.append(tokens)
        return embeds.masked_scatter(
            selected.unsqueeze(-1).expand_as(embeds), torch.cat(parts).to(embeds.dtype)
        )

    def hidden_states(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        key_weights: Tensor | None = None,
    ) -> Tensor:
        """Last hidden state ``(B, N, D)``, without the head.

        Activation checkpointing, where it is on, works in eval mode too: what needs a gradient and
        no dropout (GRPO) would not fit otherwise.

        Args:
            inputs_embeds: ``(B, N, D)``.
            attention_mask: ``(B, N)`` bool, padding on either side; or ``(B, N, N)`` bool: which
                positions (the last axis) each one sees.
            position_ids: ``(B, N)`` int64; default counts the attended positions. Needed with the
                second kind of mask.
            key_weights: ``(B, N)`` in (0, 1]: what each position counts for in the softmax of the
                attention of all that come behind it; a gradient flows to it.
        """
        if position_ids is None:
            position_ids = _positions(attention_mask)
        dtype = inputs_embeds.dtype
        if key_weights is not None:
            attention_mask = _weighted_causal_mask(attention_mask, key_weights, dtype)
        elif attention_mask.ndim == 3:
            lowest = torch.finfo(dtype).min
            attention_mask = (~attention_mask[:, None]).to(dtype).mul_(lowest)
        else:
            attention_mask = attention_mask.long()
        with self._checkpointed():
            return self._decoder(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                return_dict=True,
            ).last_hidden_state

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Transformers checkpoint a model in training mode only; its layers keep their own mode."""
        decoder = self._decoder
        training = decoder.training
        if torch.is_grad_enabled() and getattr(decoder, 'gradient_checkpointing', False):
            decoder.training = True
        try:
            yield
        finally:
            decoder.training = training

    def _same_mode(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts of a checkpoint's forward and of its repetition in the backward pass."""
        layers = self._decoder.layers
        return nullcontext(), _InMode(layers, layers.training)

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
            attention_mask: ``(B, P + N)`` int64 over past and new positions.
            position_ids: ``(B, N)`` int64.
            past_key_values: Of P positions; grows by N in place. Gradients flow through it.
        """
        return self._decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
            return_dict=True,
        )

    def caption_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean next-token cross-entropy over the labels that are not -100.

        Only supervised positions go through the head: the full ``(B, N, V)`` logits are never made.

        Args:
            hidden: ``(B, N, D)``.
            labels: ``(B, N)`` int64, not shifted.
        """
        target = labels[:, 1:]
        keep = target != -100
        if not keep.any():
            return hidden.sum() * 0.0
        logits = self.lm_head(hidden[:, :-1][keep]).float()
        return F.cross_entropy(logits, target[keep])

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
        states = hidden[at_seg].to(self._dtype_of(self.text_hidden_fcs))
        return self.text_hidden_fcs(states), at_seg.sum(dim=1).tolist()

    def segment(
        self, prompts: Tensor, features: ImageFeatures, image_index: Sequence[int] | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One mask per prompt; see `GroundingEncoder.decode`."""
        if features.sam is None:
            raise ValueError('the batch has [SEG] but no g_pixel_values')
        index = torch.as_tensor(image_index, dtype=torch.long, device=prompts.device)
        return self.grounding_encoder.decode(features.sam, prompts, index)

    def _prompt_plan(
        self, data: Mapping[str, Any], counts: Sequence[int], num_images: int
    ) -> tuple[list[int], list[int]]:
        """Which ``[SEG]`` prompts which grounding image: sample by sample, frame by frame."""
        frames = data.get('frames_per_batch')
        frames = [1] * len(counts) if frames is None else [int(f) for f in frames]
        if len(frames) != len(counts):
            with_seg = [i for i, count in enumerate(counts) if count]
            if len(frames) != len(with_seg):
                raise ValueError(
                    f'frames_per_batch has {len(frames)} entries for {len(counts)} samples, '
                    f'{len(with_seg)} of them with {SEG}'
                )
            spread = [0] * len(counts)
            for i, number in zip(with_seg, frames, strict=True):
                spread[i] = number
            frames = spread
        if sum(frames) != num_images:
            raise ValueError(f'frames_per_batch sums to {sum(frames)}, g_pixel_values {num_images}')
        segs, images, seg_start, frame_start = [], [], 0, 0
        for count, number in zip(counts, frames, strict=True):
            for frame in range(number):
                segs += range(seg_start, seg_start + count)
                images += [frame_start + frame] * count
            seg_start, frame_start = seg_start + count, frame_start + number
        return segs, images

    def _gt_masks(self, data: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
        """Ground truth in the order of the predictions (object-major -> frame by frame)."""
        masks = data['masks']
        if len(masks) != len(counts):
            raise ValueError(f'{len(masks)} mask entries for {len(counts)} samples')
        frames = data.get('frames_per_batch') or [1] * len(counts)
        if len(frames) != len(counts):
            frames = iter(frames)
            frames = [next(frames) if count else 1 for count in counts]
        ordered = []
        for i, (mask, count, number) in enumerate(zip(masks, counts, frames, strict=True)):
            found = 0 if mask is None else len(mask)
            if found != count * number:
                raise ValueError(
                    f'sample {_name(data.get("sample_ids"), i)}: {count} {SEG} × {number} frames, '
                    f'but {found} ground-truth masks'
                )
            if count:
                by_object = mask.reshape(count, number, *mask.shape[-2:])
                ordered += list(by_object.transpose(0, 1).flatten(0, 1))
        return ordered

    # ------------------------------------------------------------------ passes

    def forward(self, data: Mapping[str, Any], data_samples: Any = None, mode: str = 'loss') -> Any:
        """One pass over an official Sa2VA batch.

        Args:
            data: ``input_ids, attention_mask, position_ids, labels`` ``(B, N)``; ``pixel_values``,
                ``vp_overall_mask``, ``prompt_masks``, ``g_pixel_values``, ``masks``,
                ``frames_per_batch`` as the official recipe collates them; optional ``features``
                (`ImageFeatures`, then no encoder runs) and ``sample_ids``.
            data_samples: For ``'predict'``: `RegionMeta` with the original image sizes.
            mode: ``'loss'``: dict of losses and metrics. ``'tensor'``: dict of ``image_embeddings
                (ΣT, L, D)``, ``logits (B, N, V)``, ``loss``, ``last_hidden_state (B, N, D)``,
                ``seg_embeddings (P, 256)``, ``low_res_masks (P, 1, s/4, s/4)``,
                ``iou_predictions (P, 3)``. ``'predict'``: see `predict`.
        """
        if mode == 'predict':
            return self.predict(data, data_samples)
        if mode not in ('loss', 'tensor'):
            raise ValueError(f"mode must be 'loss', 'tensor' or 'predict', got {mode!r}")
        features = data.get('features') or self.encode_images(data)
        tiles = self.project(features)
        input_ids = data['input_ids']
        embeds = self.embed(
            input_ids,
            features,
            prompt_masks=self._spread_prompt_masks(data, features),
            sample_ids=data.get('sample_ids'),
            tiles=tiles,
        )
        attention_mask = data['attention_mask'].bool()
        hidden = self.hidden_states(embeds, attention_mask, data.get('position_ids'))
        prompts, counts = self.seg_embeddings(hidden, input_ids)
        low_res = ious = None
        if len(prompts) and features.sam is not None:
            segs, images = self._prompt_plan(data, counts, len(features.sam))
            low_res, ious, _ = self.segment(prompts[segs], features, images)
        labels = data.get('labels')
        caption_loss = None if labels is None else self.caption_loss(hidden, labels)
        if mode == 'tensor':
            return {
                'image_embeddings': tiles,
                'logits': self.lm_head(hidden).float(),
                'loss': caption_loss,
                'last_hidden_state': hidden,
                'seg_embeddings': prompts,
                'low_res_masks': low_res,
                'iou_predictions': ious,
            }
        losses: dict[str, Tensor] = {}
        if caption_loss is not None:
            losses['llm_loss'] = caption_loss
        if low_res is not None and data.get('masks') is not None:
            losses['mask_loss'], metrics = mask_loss(
                low_res.squeeze(1), self._gt_masks(data, counts)
            )
            losses.update(metrics)
        return losses

    def _spread_prompt_masks(
        self, data: Mapping[str, Any], features: ImageFeatures
    ) -> list[Tensor | None] | None:
        """One entry per sample; the official batch lists only samples that have regions."""
        masks = data.get('prompt_masks')
        if masks is None or features.vp_mask is None:
            return None
        if len(masks) == len(features):
            return list(masks)
        flagged, start = [], 0
        for count in features.num_tiles:
            flagged.append(bool(features.vp_mask[start : start + count].any()))
            start += count
        if sum(flagged) != len(masks):
            raise ValueError(f'{len(masks)} prompt_masks for {sum(flagged)} images with regions')
        remaining = iter(masks)
        return [next(remaining) if has else None for has in flagged]

    @no_gradient()
    def generate(
        self,
        data: Mapping[str, Any],
        max_new_tokens: int = 256,
        *,
        stop_strings: Sequence[str] | None = None,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        suppress_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Continues the prompts of ``data``, by `sample_completions`.

        Args:
            data: As in `forward`; ``input_ids`` may be padded on either side. With ``image_index``
                (the image of each sequence) there may be other sequences than images, and
                ``prompt_masks`` has an entry per sequence.
            max_new_tokens: Maximum number of new tokens. Defaults to 256.
            stop_strings: Texts that end a sequence, each by itself; ``None`` takes the template's
                where there is a tokenizer. Defaults to None.
            min_new_tokens: Number of tokens before which no end and no stop text may begin.
                Defaults to 0.
            do_sample: Draw tokens instead of taking the most likely one. Defaults to False.
            temperature: Sampling temperature. Defaults to 1.0.
            top_p: Probability mass of the most likely tokens that a draw keeps. Defaults to 1.0.
            top_k: Number of most likely tokens that a draw keeps; 0 keeps all. Defaults to 0.
            eos_token_id: Id or ids that end a sequence; ``None`` takes the model's. Defaults to
                None.
            suppress_tokens: Ids that are never generated, beside those without text. Defaults to
                none.
            generator: Source of randomness. Defaults to torch's.
            **unknown: Options that there are not.

        Returns:
            ``(B, T_new)`` int64, the new tokens only, padded after each sequence's end.

        Raises:
            TypeError: An option is unknown; the message names the nearest.
        """
        for name in unknown:
            known = [*inspect.signature(self.generate).parameters][:-1]
            raise TypeError(f'generate() has no option {name!r}: {nearest(name, known)}')
        features = data.get('features') or self.encode_images(data, grounding=False)
        input_ids, attention_mask = _left_padded(
            data['input_ids'], data['attention_mask'].bool(), self.pad_token_id
        )
        image_index = data.get('image_index')
        embeds = self.embed(
            input_ids,
            features,
            prompt_masks=data['prompt_masks']
            if image_index is not None
            else self._spread_prompt_masks(data, features),
            image_index=image_index,
            sample_ids=data.get('sample_ids'),
        )
        if stop_strings is None:
            template = _template_name(self.config['template'])
            stop_strings = () if self.tokenizer is None else TEMPLATE_STOP_STRINGS[template]
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_strings=tuple(stop_strings),
            greedy=not do_sample,
            min_new_tokens=min_new_tokens,
            eos_token_id=eos_token_id,
            suppress_tokens=tuple(suppress_tokens),
        )
        drawn = sample_completions(self, embeds, attention_mask, 1, sampling, generator)
        return drawn.completion_ids

    @no_gradient()
    def predict(
        self, data: Mapping[str, Any], data_samples: Sequence[Any] | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Generates freely, then segments every ``[SEG]`` that was generated.

        Args:
            data: As in `forward`, prompts only.
            data_samples: Give ``height`` and ``width`` of the original images; where absent,
                ``data['masks']`` do, else masks come at the grounding image's size.
            **options: Passed to `generate`.

        Returns:
            A dict per sample: ``caption`` (cleaned text), ``token_ids``, ``masks`` ``(P, H, W)``
            bool on the CPU.
        """
        if self.tokenizer is None:
            raise ValueError("mode='predict' decodes text: give the model a tokenizer")
        features = data.get('features') or self.encode_images(data)
        data = {**data, 'features': features}
        new_ids = self.generate(data, **options)
        prompt_ids, prompt_mask = _left_padded(
            data['input_ids'], data['attention_mask'].bool(), self.pad_token_id
        )
        ids = torch.cat([prompt_ids, new_ids], dim=1)
        generated = torch.zeros_like(ids, dtype=torch.bool)
        generated[:, prompt_ids.shape[1] :] = new_ids != self.pad_token_id
        at_seg = generated & (ids == self.seg_token_id)
        masks: list[Tensor | None] = [None] * len(ids)
        if at_seg.any():
            embeds = self.embed(
                ids, features, prompt_masks=self._spread_prompt_masks(data, features)
            )
            attended = torch.cat([prompt_mask, generated[:, prompt_ids.shape[1] :]], dim=1)
            hidden = self.hidden_states(embeds, attended)
            prompts, counts = self.seg_embeddings(hidden, torch.where(at_seg, ids, -1))
            images = [i for i, count in enumerate(counts) for _ in range(count)]
            low_res, _, _ = self.segment(prompts, features, images)
            for i in range(len(ids)):
                if counts[i]:
                    start = sum(counts[:i])
                    logits = low_res[start : start + counts[i]]
                    size = self._original_size(data, data_samples, i)
                    masks[i] = upsample_masks(logits, size)[:, 0].cpu()
        texts = self.tokenizer.batch_decode(new_ids)
        return [
            {
                'caption': clean_caption(text),
                'token_ids': tokens,
                'masks': torch.zeros(0, *self._original_size(data, data_samples, i)).bool()
                if masks[i] is None
                else masks[i],
            }
            for i, (text, tokens) in enumerate(zip(texts, new_ids.cpu(), strict=True))
        ]

    def _original_size(
        self, data: Mapping[str, Any], data_samples: Sequence[Any] | None, i: int
    ) -> tuple[int, int]:
        if data_samples is not None:
            return data_samples[i].height, data_samples[i].width
        if data.get('masks') is not None:
            return tuple(data['masks'][i].shape[-2:])
        return (self.grounding_encoder.image_size,) * 2


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


class _SchedulesOnCPU(TorchFunctionMode):
    """Lets SAM 2 and InternViT be built on the meta device.

    They read their stochastic-depth schedule with ``torch.linspace(...).item()``, which has no
    value there.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs['device'] = 'cpu'
        return func(*args, **kwargs)


def upsample_masks(low_res_masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks at original size, as the official inference makes them.

    Args:
        low_res_masks: ``(P, 1, h, w)`` logits.
        size: ``(H, W)`` in pixels.

    Returns:
        ``(P, 1, H, W)`` bool: bilinear upsampling, sigmoid above 0.5.
    """
    return upsample_logits(low_res_masks, size) > 0


def upsample_logits(low_res_masks: Tensor, size: tuple[int, int]) -> Tensor:
    """``(P, 1, h, w)`` mask logits as ``(P, 1, H, W)`` float32, bilinear as officially."""
    return F.interpolate(low_res_masks.float(), size=size, mode='bilinear', align_corners=False)


def _weighted_causal_mask(
    attention_mask: Tensor, key_weights: Tensor, dtype: torch.dtype
) -> Tensor:
    """``(B, 1, N, N)``, added to the scores: log weight of a key, or the lowest number."""
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    allowed = causal & attention_mask.bool()[:, None]
    scores = key_weights.log().to(dtype)[:, None].expand(-1, length, -1)
    return scores.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def _positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _left_padded(
    input_ids: Tensor, attention_mask: Tensor, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Moves padding to the left, where generation needs it; keeps the order of the tokens."""
    order = attention_mask.long().argsort(dim=1, stable=True)
    ids = torch.where(attention_mask, input_ids, pad_token_id)
    width = int(attention_mask.sum(dim=1).max())
    return ids.gather(1, order)[:, -width:], attention_mask.gather(1, order)[:, -width:]


def _template_name(template: str) -> str:
    """As xtuner writes it; a config.json may have hyphens."""
    return template.replace('-', '_')


def _name(sample_ids: Sequence[str] | None, i: int) -> str:
    return f'{i} of the batch' if sample_ids is None else repr(sample_ids[i])
