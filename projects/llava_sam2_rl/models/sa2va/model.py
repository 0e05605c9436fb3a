"""`VideoLLaVASAMModel`: Sa2VA with its checkpoint, what of it is trained, and its three modes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from projects.llava_sam2_rl.losses.mask import mask_loss
from projects.llava_sam2_rl.models.generation import Sampling, no_gradient, sample_completions
from projects.llava_sam2_rl.models.sa2va.checkpoint import (
    load_official,
    load_xtuner,
    merged_state,
    save_official,
)
from projects.llava_sam2_rl.models.sa2va.internvl import architecture
from projects.llava_sam2_rl.models.sa2va.language import enable_checkpointing
from projects.llava_sam2_rl.models.sa2va.masks import upsample_masks
from projects.llava_sam2_rl.models.sa2va.merged_answers import merged_answers
from projects.llava_sam2_rl.models.sa2va.network import Sa2VANetwork
from projects.llava_sam2_rl.models.sa2va.official_batch import (
    align_prompt_masks,
    gt_masks,
    left_padded,
    original_size,
    prompt_masks_of_sequences,
    prompt_plan,
)
from projects.llava_sam2_rl.models.sa2va.quantization import check_quantization, quantize
from projects.llava_sam2_rl.models.sa2va.self_test import check_language_model
from projects.llava_sam2_rl.models.sa2va.trainable import (
    OFFICIAL_TRAINABLE,
    add_lora,
    check_parts,
    set_trainable,
)
from projects.llava_sam2_rl.models.sa2va.vocabulary import load_tokenizer, save_tokenizer
from projects.llava_sam2_rl.prompts import (
    Questions,
    clean_caption,
    decode_text,
    find_template,
)
from projects.llava_sam2_rl.registry import MODELS, from_options, nearest
from projects.llava_sam2_rl.utils.pretrained import SIZES, complete_sizes, read_config, resolve


@MODELS.register_module()
class VideoLLaVASAMModel(Sa2VANetwork):
    """Sa2VA: InternVL that talks about images, SAM 2 that segments what ``[SEG]`` points to.

    Args:
        vision_config: InternViT sizes, as in the official ``config.json``. Defaults to those of
            ``pretrained``, as do all options down to ``downsample_ratio``.
        llm_config: Language model sizes, as there; ``architectures`` names one of
            Qwen2ForCausalLM, Phi3ForCausalLM, InternLM2ForCausalLM.
        grounding_encoder_config: SAM 2 sizes. Where neither says, Hiera-L at 1024 px.
        template: Name of the chat template: ``'phi3_chat'``, ``'qwen_chat'`` or
            ``'internlm2_chat'``; must be given where there is no ``pretrained``.
        select_layer: ViT layer whose output is used. Where neither says, -1.
        ps_version: Pixel shuffle version. Where neither says, ``'v2'``.
        force_image_size: Side of a tile in pixels. Where neither says, 448.
        downsample_ratio: Pixel shuffle ratio. Where neither says, 0.5.
        questions: Options of `Questions`: what the model is asked. Defaults to None: theirs.
        tokenizer: A tokenizer, or a folder with one. Defaults to the one in ``pretrained``; where
            there is none, ``special_token_ids`` is needed.
        special_token_ids: Token -> id, at least ``<IMG_CONTEXT>`` and ``[SEG]``; overrides the
            tokenizer. Defaults to the tokenizer's.
        pretrained: Folder in the official layout whose weights are loaded. Defaults to None:
            random weights.
        checkpoint: Official training checkpoint (xtuner ``.pth``), loaded last. Defaults to None.
        lora: Options of `peft.LoraConfig`; ``target_modules`` defaults to the official recipe's.
            Defaults to None: no adapter.
        trainable: Parts that are trained, of ``'vision_model'``, ``'mlp1'``, ``'language_model'``,
            ``'lora'``, ``'text_hidden_fcs'``, ``'mask_decoder'`` and ``'grounding_encoder'``; all
            else is frozen. Defaults to the official recipe's: ``('mlp1', 'lora',
            'text_hidden_fcs', 'mask_decoder')``.
        torch_dtype: Dtype of the frozen weights and of what `save_pretrained` writes; trained
            weights are kept in float32 (DeepSpeed casts them itself and keeps float32 masters).
            Defaults to ``'float32'``.
        gradient_checkpointing: Recompute InternViT's and the language model's activations in the
            backward pass. Defaults to False.
        quantization: ``'nf4'`` or ``'int8'``: the language model's frozen linear layers in 4 or 8
            bits, by bitsandbytes. Defaults to None: in ``torch_dtype``.
        attention: Of passes that share prefixes, ``'sdpa'``, ``'flex'`` (FlexAttention) or
            ``'auto'``: that on a GPU where it works, by nodes on a CPU. Defaults to ``'auto'``.

    Raises:
        CheckpointError: ``pretrained`` or ``checkpoint`` is missing, damaged or does not fit.
        StackError: The language model masks wrongly with this version of transformers, or there is
            no bitsandbytes for ``quantization``.
        ValueError: An option has no valid value.
    """

    #: Kept in eval mode; set once the parts are built.
    _frozen_encoders: Sequence[nn.Module] = ()

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
        questions: dict | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        special_token_ids: Mapping[str, int] | None = None,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        lora: dict | None = None,
        trainable: Sequence[str] = OFFICIAL_TRAINABLE,
        torch_dtype: str | torch.dtype = 'float32',
        gradient_checkpointing: bool = False,
        quantization: str | None = None,
        attention: str = 'auto',
    ):
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
        find_template(sizes['template'])
        check_parts(trainable)
        check_quantization(quantization, trainable, lora)
        check_language_model(architecture(sizes['llm_config']))
        folder = None if pretrained is None else str(resolve(pretrained))
        dtype = getattr(torch, torch_dtype) if isinstance(torch_dtype, str) else torch_dtype
        super().__init__(
            {'model_type': 'sa2va_chat', 'architectures': ['Sa2VAChatModel'], **sizes},
            dtype,
            load_tokenizer(tokenizer, folder),
            special_token_ids,
            folder,
            attention,
        )
        self.torch_dtype: torch.dtype = dtype
        self.questions = from_options(Questions, 'VideoLLaVASAMModel.questions', questions or {})
        self.quantization, self._base_folder = quantization, folder
        if folder is not None:
            load_official(self, folder)
        quantize(self.language_model, quantization, dtype)
        if lora is not None:
            self.language_model = add_lora(self.language_model, lora, self.config['llm_config'])
        if checkpoint is not None:
            names = load_xtuner(self, checkpoint)
            print_log(f'{checkpoint}: {len(names)} tensors loaded', logger='current')
        self._frozen_encoders = set_trainable(self, trainable)
        self.train(self.training)
        self.vision_model.encoder.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            enable_checkpointing(self.language_model)
        self.language_model.config.use_cache = False

    def init_weights(self) -> None:
        """Nothing: the weights are there once the model is built.

        mmengine's runner calls this before the first step. Its default goes through the children
        to transformers' own ``init_weights``, which draws anew what it did not load itself: the
        LoRA matrices, so that training would start from a model with noise in every layer.
        """
        self._is_init = True

    def train(self, mode: bool = True) -> VideoLLaVASAMModel:
        """Sets the training mode; frozen encoders stay in eval mode."""
        super().train(mode)
        for module in self._frozen_encoders:
            module.eval()
        return self

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
            **overrides: Any other option of the class (``lora``, ``trainable``, …).

        Raises:
            CheckpointError: The folder is missing, of another model, damaged, or its keys differ
                from the model's; the message lists them.
        """
        folder = resolve(folder)
        config = read_config(folder)
        model = cls(tokenizer=tokenizer, pretrained=str(folder), **overrides)
        # Kept whole, so that what was read is written back, entries for other readers included.
        sizes = {k: v for k, v in model.config.items() if k in SIZES}
        model.config = {**config, **sizes}
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the official layout: config, safetensors with LoRA merged, and the tokenizer.

        With ``quantization`` LoRA is merged into the weights of ``pretrained`` as they lie there,
        and it is logged how far the answers of what was written are from this model's.

        Args:
            folder: Made where it does not exist.
            dtype: Of the tensors; default the ``torch_dtype`` the model was built with.
        """
        dtype = self.torch_dtype if dtype is None else dtype
        save_official(merged_state(self, dtype, self._base_folder), self.config, folder)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)
        if self.quantization is not None:
            merged_answers(self, folder, dtype)

    # ------------------------------------------------------------------- modes

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
            prompt_masks=align_prompt_masks(data, features),
            sample_ids=data.get('sample_ids'),
            tiles=tiles,
        )
        attention_mask = data['attention_mask'].bool()
        hidden = self.hidden_states(embeds, attention_mask, data.get('position_ids'))
        prompts, counts = self.seg_embeddings(hidden, input_ids)
        low_res = ious = None
        if len(prompts) and features.sam is not None:
            segs, images = prompt_plan(data, counts, len(features.sam))
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
            losses['mask_loss'], metrics = mask_loss(low_res.squeeze(1), gt_masks(data, counts))
            losses.update(metrics)
        return losses

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
        input_ids, attention_mask = left_padded(data, self.pad_token_id)
        embeds = self.embed(
            input_ids,
            features,
            prompt_masks=prompt_masks_of_sequences(data, features),
            image_index=data.get('image_index'),
            sample_ids=data.get('sample_ids'),
        )
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_strings=None if stop_strings is None else tuple(stop_strings),
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
            data: As in `generate`.
            data_samples: Give ``height`` and ``width`` of each sequence's original image; where
                absent, ``data['masks']`` do, else masks come at the grounding image's size.
            **options: Passed to `generate`.

        Returns:
            A dict per sequence: ``caption`` (cleaned text), ``token_ids``, ``masks`` ``(P, H, W)``
            bool on the CPU.
        """
        if self.tokenizer is None:
            raise ValueError("mode='predict' decodes text: give the model a tokenizer")
        data = {**data, 'features': data.get('features') or self.encode_images(data)}
        new_ids = self.generate(data, **options)
        low_res = self._segment_generated(data, new_ids)
        texts = [decode_text(self.tokenizer, tokens) for tokens in new_ids]
        results = []
        for i, (text, tokens, logits) in enumerate(zip(texts, new_ids.cpu(), low_res, strict=True)):
            size = original_size(data, data_samples, i, self.grounding_encoder.image_size)
            masks = upsample_masks(logits, size)[:, 0] if len(logits) else torch.zeros(0, *size)
            results.append(
                {'caption': clean_caption(text), 'token_ids': tokens, 'masks': masks.bool().cpu()}
            )
        return results

    def _segment_generated(self, data: Mapping[str, Any], new_ids: Tensor) -> list[Tensor]:
        """For each of B sequences the masks of the ``[SEG]`` it got: ``(P, 1, h, w)`` logits."""
        prompts, counts = self.generated_seg_embeddings(data, new_ids)
        if not len(prompts):
            return [new_ids.new_zeros(0)] * len(new_ids)
        images = data.get('image_index') or range(len(new_ids))
        index = [image for image, n in zip(images, counts, strict=True) for _ in range(n)]
        low_res, _, _ = self.segment(prompts, data['features'], index)
        return list(low_res.split(counts))
