"""`DualLoopModel`: describing a region and finding a described region, trained together."""

from __future__ import annotations

import inspect
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from projects.llava_sam2_rl.engine.distributed import Agreement, agree, zero_of
from projects.llava_sam2_rl.engine.timing import phase
from projects.llava_sam2_rl.losses import project_conflicting
from projects.llava_sam2_rl.models.generation import Sampling, no_gradient, sample_completions
from projects.llava_sam2_rl.models.sa2va.features import ImageFeatures
from projects.llava_sam2_rl.models.sa2va.masks import upsample_masks
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.schedule import AdaptiveWeights, Curriculum
from projects.llava_sam2_rl.models.shared_prefix import Reading
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.prompts import (
    IGNORE_INDEX,
    SEGMENTATION_ANSWERS,
    caption_answer,
    clean_caption,
    encode_conversation,
    encode_pair,
    encode_prompt,
    pad_batch,
    region_prompt,
    segmentation_answer,
    segmentation_prompt,
    segmentation_prompt_around,
    strip_final_period,
)
from projects.llava_sam2_rl.registry import MODELS, OBJECTIVES, nearest
from projects.llava_sam2_rl.structures import RegionMeta
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid


@dataclass(frozen=True)
class LoopBatch:
    """B samples with their images encoded once.

    Args:
        features: Of all images of the batch: the B first frames, then the P second frames.
        captions: Reference captions, ``None`` where there is none.
        prompt_masks: B × ``(R, h, w)`` bool, the regions on the token grid of the first frame.
        union_masks: B × ``(H, W)`` bool, the regions of the first frame, joined.
        image: B indices into ``features``: the first frames.
        target_image: B indices into ``features``: where the return trip happens.
        target_masks: B × ``(H, W)`` bool, what the return trip should find.
        names: B sample names for messages.
        conversations: B × (``(question, answer)`` turns or ``None``); a sample with turns has no
            region.
        counts: Of how many items each loss is the mean, by the loss's key; whoever computes a loss
            enters it, so that ranks with different numbers weigh alike (`distributed.agree`).
    """

    features: ImageFeatures
    captions: list[str | None]
    prompt_masks: list[Tensor]
    union_masks: list[Tensor]
    image: list[int]
    target_image: list[int]
    target_masks: list[Tensor]
    names: list[str]
    conversations: list[Sequence[tuple[str, str]] | None]
    counts: dict[str, Tensor | float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    def subset(self, indices: Sequence[int]) -> LoopBatch:
        """Some of the samples; the features stay those of all images."""
        if len(indices) == len(self):
            return self
        chosen = {
            x.name: [getattr(self, x.name)[i] for i in indices]
            for x in fields(self)
            if x.name not in ('features', 'counts')
        }
        return replace(self, **chosen)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Turns dropout off inside the scope."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@MODELS.register_module()
class DualLoopModel(BaseModel):
    """Policy, teacher and objective around one batch.

    Args:
        policy: The trained model or its config.
        objective: What carries the learning signal, or its config (`SFTObjective`, …).
        teacher: Options of `EMATeacher` (``decay``).
        mask_to_caption: ``dict(weight=…)`` of the first direction; 0 turns it off.
        caption_to_mask: ``dict(weight=…)`` of the second direction; 0 turns it off.
        chat: ``dict(weight=…)`` of the cross-entropy of ordinary conversations, for data that has
            some.
        adaptive_weights: See `AdaptiveWeights`; ``None`` = the weights stay as given.
        curriculum: See `Curriculum`; ``None`` = all samples from the start.
        max_new_tokens: Longest caption in tokens.
        predict_with: ``'policy'`` or ``'teacher'``: which weights `predict` uses.
        max_skipped_steps: Steps with a loss that is not finite that are skipped before the run
            stops.
        data_preprocessor: See mmengine's ``BaseModel``.
    """

    def __init__(
        self,
        policy: VideoLLaVASAMModel | dict,
        objective: Any,
        teacher: dict | None = None,
        mask_to_caption: dict | None = None,
        caption_to_mask: dict | None = None,
        chat: dict | None = None,
        adaptive_weights: dict | None = None,
        curriculum: dict | None = None,
        max_new_tokens: int = 64,
        predict_with: str = 'policy',
        max_skipped_steps: int = 10,
        data_preprocessor: dict | nn.Module | None = None,
        **unknown: Any,
    ):
        super().__init__(data_preprocessor=data_preprocessor)
        # The runner builds this class before anything has imported the registries' own check.
        for key in unknown:
            valid = list(inspect.signature(DualLoopModel).parameters)
            raise TypeError(f'DualLoopModel has no option {key!r}: {nearest(key, valid)}')
        if predict_with not in ('policy', 'teacher'):
            raise ValueError(f"predict_with must be 'policy' or 'teacher', got {predict_with!r}")
        self.mask_to_caption_weight = _weight('mask_to_caption', mask_to_caption)
        self.caption_to_mask_weight = _weight('caption_to_mask', caption_to_mask)
        if self.mask_to_caption_weight == self.caption_to_mask_weight == 0:
            raise ValueError('both directions have weight 0: there is nothing to train')
        self.chat_weight = _weight('chat', chat)
        self.adaptive_weights = _from_options(AdaptiveWeights, 'adaptive_weights', adaptive_weights)
        self.curriculum = _from_options(Curriculum, 'curriculum', curriculum)
        self._weights = self.mask_to_caption_weight, self.caption_to_mask_weight
        self.policy: VideoLLaVASAMModel = (
            MODELS.build(policy) if isinstance(policy, dict) else policy
        )
        if self.policy.tokenizer is None:
            raise ValueError('the policy needs a tokenizer: its prompts are text')
        self.objective = OBJECTIVES.build(objective) if isinstance(objective, dict) else objective
        #: Not a module: its float32 shadows must not be cast, nor saved as the policy's weights.
        self.teacher = EMATeacher(self.policy, **(teacher or {}))
        self.max_new_tokens = max_new_tokens
        self.predict_with = predict_with
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        if self.adaptive_weights is not None and not hasattr(self.objective, 'last'):
            raise ValueError(
                f'adaptive_weights compares rewards, {type(self.objective).__name__} has none'
            )
        if hasattr(self.objective, 'attach'):
            self.objective.attach(self)
        self.register_load_state_dict_post_hook(_expect_trainable_only)

    def init_weights(self) -> None:
        """Nothing, see `VideoLLaVASAMModel.init_weights`."""
        self._is_init = True

    # ------------------------------------------------------------- the teacher

    def update_teacher(self) -> None:
        """Moves the teacher towards the policy; to be called once an optimizer step."""
        with phase('teacher'):
            self.teacher.update(self.policy)

    @contextmanager
    def teacher_applied(self) -> Iterator[None]:
        """Inside the scope the policy computes with the teacher's weights."""
        with ExitStack() as scope:
            with phase('teacher'):
                scope.enter_context(self.teacher.applied_to(self.policy))
            yield

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Trainable tensors only: all else is in the folder the policy was built from."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get('prefix', '')
        trainable = {prefix + name for name, p in self.named_parameters() if p.requires_grad}
        return OrderedDict((key, value) for key, value in state.items() if key in trainable)

    # ------------------------------------------------------------------- steps

    def encode(self, data: Mapping[str, Any], names: Sequence[str] | None = None) -> LoopBatch:
        """Runs the frozen encoders once for every image of the batch.

        Args:
            data: What `sa2va_collate` made.
            names: Sample names for messages.
        """
        pair = data.get('pair')
        count = len(data['captions'])
        images = {key: list(data[key]) for key in ('pixel_values', 'g_pixel_values')}
        vp_mask = [data['vp_overall_mask']]
        target_image = list(range(count))
        target_masks = list(data['masks'])
        if pair is not None:
            for position, sample in enumerate(pair['index'].tolist()):
                target_image[sample] = count + position
                target_masks[sample] = pair['masks'][position]
            for key in images:
                images[key] += list(pair[key])
            vp_mask.append(pair['vp_overall_mask'])
        with phase('encode'):
            features = self.policy.encode_images({**images, 'vp_overall_mask': torch.cat(vp_mask)})
        return LoopBatch(
            features=features,
            captions=list(data['captions']),
            prompt_masks=list(data['prompt_masks']),
            union_masks=[mask.any(dim=0) for mask in data['masks']],
            image=list(range(count)),
            target_image=target_image,
            # One caption has one [SEG]: what it speaks of is found as a whole.
            target_masks=[mask.any(dim=0) for mask in target_masks],
            names=[str(i) for i in range(count)] if names is None else list(names),
            conversations=list(data.get('conversations') or [None] * count),
        )

    strip_final_period = staticmethod(strip_final_period)

    def eval_mode(self) -> AbstractContextManager[None]:
        """Inside the scope the policy has no dropout."""
        return eval_mode(self.policy)

    def write_captions(
        self,
        batch: LoopBatch,
        images: Sequence[int] | None = None,
        prompt_masks: Sequence[Tensor] | None = None,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> list[str]:
        """Describes regions, without gradient; greedy by default.

        Args:
            batch: The batch.
            images: N indices into ``batch.features``; default the B first frames.
            prompt_masks: N × ``(R, h, w)`` bool; default the batch's own regions. A region without
                a cell (an empty predicted mask) is described by nothing: ``''``.
            names: N sample names.
            **options: Of `Sampling`.

        Returns:
            N cleaned captions.
        """
        if prompt_masks is not None:
            full = [i for i, grid in enumerate(prompt_masks) if grid.flatten(1).any(1).all()]
            if len(full) < len(prompt_masks):
                captions = [''] * len(prompt_masks)
                if full:
                    written = self.write_captions(
                        batch,
                        [images[i] for i in full],
                        [prompt_masks[i] for i in full],
                        [names[i] for i in full],
                        **options,
                    )
                    for i, text in zip(full, written, strict=True):
                        captions[i] = text
                return captions
        images = batch.image if images is None else images
        prompt_masks = batch.prompt_masks if prompt_masks is None else prompt_masks
        names = batch.names if names is None else names
        policy = self.policy
        prompts = [
            encode_prompt(policy.tokenizer, self._region_text(batch, image, grid))
            for image, grid in zip(images, prompt_masks, strict=True)
        ]
        data = pad_batch(prompts, policy.pad_token_id, 'left', device=self.device)
        options = {'greedy': True, **options}
        sampling = Sampling(max_new_tokens=self.max_new_tokens, **options)
        with eval_mode(policy), no_gradient():
            embeds = policy.embed(
                data['input_ids'],
                batch.features,
                prompt_masks=prompt_masks,
                image_index=images,
                sample_ids=names,
            )
            return sample_completions(
                policy,
                embeds,
                data['attention_mask'],
                1,
                sampling,
                shared=self.shared_start(batch, images, prompts[0]),
                sources=images,
            ).texts

    def caption_loss(
        self,
        batch: LoopBatch,
        samples: Sequence[int],
        prompt_masks: Sequence[Tensor] | None = None,
        cell_weights: Sequence[Tensor] | None = None,
        count_as: str | None = None,
    ) -> Tensor:
        """Cross-entropy of the reference captions of some samples.

        Args:
            batch: The batch.
            samples: N indices of samples that have a caption.
            prompt_masks: N × ``(R, h, w)`` bool; default the samples' own regions.
            cell_weights: See `VideoLLaVASAMModel.embed`.
            count_as: Key of ``batch.counts`` that gets the number of tokens.
        """
        policy = self.policy
        if prompt_masks is None:
            prompt_masks = [batch.prompt_masks[i] for i in samples]
        pairs = [
            encode_pair(
                policy.tokenizer,
                self._region_text(batch, batch.image[i], grid),
                caption_answer(batch.captions[i]),
            )
            for i, grid in zip(samples, prompt_masks, strict=True)
        ]
        data = self._padded(pairs)
        embeds = policy.embed(
            data['input_ids'],
            batch.features,
            prompt_masks=prompt_masks,
            image_index=[batch.image[i] for i in samples],
            sample_ids=[batch.names[i] for i in samples],
            cell_weights=cell_weights,
        )
        if count_as is not None:
            batch.counts[count_as] = _num_supervised(data['labels'])
        hidden = policy.hidden_states(embeds, data['attention_mask'], data['position_ids'])
        return policy.caption_loss(hidden, data['labels'])

    def chat_loss(self, batch: LoopBatch, samples: Sequence[int]) -> Tensor:
        """Cross-entropy of the answers of conversations about whole images.

        Args:
            batch: The batch.
            samples: Indices of samples that have a conversation.
        """
        policy = self.policy
        images = [batch.image[i] for i in samples]
        data = self._padded(
            [
                encode_conversation(
                    policy.tokenizer, self._image_tokens(batch, image), batch.conversations[i]
                )
                for i, image in zip(samples, images, strict=True)
            ]
        )
        embeds = policy.embed(
            data['input_ids'],
            batch.features,
            image_index=images,
            sample_ids=[batch.names[i] for i in samples],
        )
        batch.counts['chat/caption_loss'] = _num_supervised(data['labels'])
        hidden = policy.hidden_states(embeds, data['attention_mask'], data['position_ids'])
        return policy.caption_loss(hidden, data['labels'])

    def segment_descriptions(
        self,
        batch: LoopBatch,
        descriptions: Sequence[str | Tensor],
        images: Sequence[int],
        names: Sequence[str],
        *,
        weights: Sequence[Tensor | None] | None = None,
        answer_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One mask per description in one forward; the answer with ``[SEG]`` is given.

        Args:
            batch: The batch.
            descriptions: N texts, or the embeddings ``(L, D)`` that stand in a text's place.
            images: N indices into ``batch.features``.
            names: N sample names.
            weights: What each token of a description counts for in the reader's attention, ``(L,)``
                in (0, 1] for embeddings, ``None`` for texts.
            answer_loss: Whether the answer's cross-entropy is computed.

        Returns:
            ``(N, h, w)`` float32 mask logits at low resolution, and the mean cross-entropy of the
            answer's tokens or ``None``.
        """
        prompts, loss = self.seg_prompts(
            batch, descriptions, images, names, weights=weights, answer_loss=answer_loss
        )
        low_res, _, _ = self.policy.segment(prompts, batch.features, images)
        return low_res.squeeze(1), loss

    def seg_prompts(
        self,
        batch: LoopBatch,
        descriptions: Sequence[str | Tensor],
        images: Sequence[int],
        names: Sequence[str],
        *,
        weights: Sequence[Tensor | None] | None = None,
        answer_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``(N, 256)``: what each description prompts SAM 2 with; else `segment_descriptions`.

        Raises:
            ValueError: A sequence has not exactly one ``[SEG]``.
        """
        if len(set(images)) < len(images) and weights is None:
            reading = Reading(self, batch)
            asked = reading.add_descriptions(descriptions, images, names)
            reading.run()
            loss = reading.answer_loss(asked) if answer_loss else None
            return reading.seg_prompts(asked, names), loss
        data, starts = self.segmentation_inputs(descriptions, images, batch, names)
        key_weights = None
        if weights is not None:
            length = data['embeds'].shape[1]
            key_weights = torch.stack(
                [
                    data['embeds'].new_ones(length, dtype=torch.float32)
                    if row is None
                    else F.pad(row.float(), (start, length - start - len(row)), value=1.0)
                    for row, start in zip(weights, starts, strict=True)
                ]
            )
        hidden = self.policy.hidden_states(
            data['embeds'], data['attention_mask'], data['position_ids'], key_weights
        )
        prompts = self.at_seg(hidden, data['input_ids'], names)
        return prompts, self.policy.caption_loss(hidden, data['labels']) if answer_loss else None

    def at_seg(self, hidden: Tensor, input_ids: Tensor, names: Sequence[str]) -> Tensor:
        """`VideoLLaVASAMModel.seg_embeddings` of sequences that have one ``[SEG]`` each.

        Raises:
            ValueError: One has another number of them.
        """
        prompts, counts = self.policy.seg_embeddings(hidden, input_ids)
        for name, count in zip(names, counts, strict=True):
            if count != 1:
                raise ValueError(f'sample {name!r}: expected 1 [SEG] in the answer, found {count}')
        return prompts

    def segmentation_inputs(
        self,
        descriptions: Sequence[str | Tensor],
        images: Sequence[int],
        batch: LoopBatch,
        names: Sequence[str],
    ) -> tuple[dict[str, Tensor], list[int]]:
        """`pad_batch` of the prompts and answers of N descriptions, with ``embeds`` ``(N, L, D)``.

        Returns:
            The tensors, and where each description's own embeddings begin.
        """
        answer = segmentation_answer(SEGMENTATION_ANSWERS[0])
        pairs = [
            self._segmentation_pair(self._image_tokens(batch, image), description, answer)
            for description, image in zip(descriptions, images, strict=True)
        ]
        data = self._padded([(ids, labels) for ids, labels, _ in pairs])
        embeds = self.policy.embed(
            data['input_ids'], batch.features, image_index=images, sample_ids=names
        )
        spliced = [x for x in descriptions if isinstance(x, Tensor)]
        if spliced:
            given = torch.zeros_like(data['input_ids'], dtype=torch.bool)
            for row, (description, (*_, start)) in enumerate(zip(descriptions, pairs, strict=True)):
                if isinstance(description, Tensor):
                    given[row, start : start + len(description)] = True
            embeds = embeds.masked_scatter(given[..., None], torch.cat(spliced).to(embeds.dtype))
        return {**data, 'embeds': embeds}, [start for *_, start in pairs]

    def region_inputs(self, batch: LoopBatch) -> tuple[dict[str, Tensor], list[str]]:
        """`pad_batch`, on the left, of the region prompts with ``embeds`` ``(B, L, D)``; texts."""
        texts = [self.region_text(batch, i) for i in range(len(batch))]
        data = pad_batch(
            [encode_prompt(self.policy.tokenizer, text) for text in texts],
            self.policy.pad_token_id,
            'left',
            device=self.device,
        )
        embeds = self.policy.embed(
            data['input_ids'],
            batch.features,
            prompt_masks=batch.prompt_masks,
            image_index=batch.image,
            sample_ids=batch.names,
        )
        return {**data, 'embeds': embeds}, texts

    def _segmentation_pair(
        self, num_image_tokens: int, description: str | Tensor, answer: str
    ) -> tuple[list[int], list[int], int]:
        """Ids, labels, and where the description's embeddings go (padding ids stand there)."""
        tokenizer = self.policy.tokenizer
        if isinstance(description, str):
            prompt = segmentation_prompt(num_image_tokens, description)
            return (*encode_pair(tokenizer, prompt, answer), 0)
        before, behind = segmentation_prompt_around(num_image_tokens)
        before = encode_prompt(tokenizer, before)
        gap = [self.policy.pad_token_id] * len(description)
        ids, labels = encode_pair(tokenizer, behind, answer)
        masked = [IGNORE_INDEX] * (len(before) + len(gap))
        return before + gap + ids, masked + labels, len(before)

    # ----------------------------------------------------------------- forward

    def forward(
        self,
        data: Any,
        data_samples: Any = None,
        mode: str = 'loss',
    ) -> Any:
        """mmengine's entry.

        Args:
            data: What `sa2va_collate` made.
            data_samples: B `RegionMeta`.
            mode: ``'loss'``: dict of weighted losses; metrics go to the message hub.
                ``'predict'``: see `predict`. ``'objective'``: `losses` of a `LoopBatch` and its
                rollouts; `train_step` calls it, so that what is wrapped around the model sees one
                forward before each backward.
        """
        if mode == 'objective':
            return self.losses(data, data_samples)
        names = None if data_samples is None else [meta.name for meta in data_samples]
        if mode == 'predict':
            return self.predict(data, data_samples)
        if mode != 'loss':
            raise ValueError(f"mode must be 'loss', 'objective' or 'predict', got {mode!r}")
        batch = self.encode(data, names)
        losses, metrics = self.losses(batch)
        agreed = agree(losses, metrics, batch.counts)
        self._log(agreed)
        return agreed.weigh(losses)

    def roll_out(self, batch: LoopBatch) -> Any:
        """The objective's rollouts of a batch, for several calls of `losses`."""
        regions = self._region_samples(batch)
        self._adapt_weights()
        rollouts = self.objective.roll_out(self, batch.subset(regions)) if regions else {}
        # Also on a rank without regions: the others wait for its part.
        return self.objective.share(rollouts, self.device)

    def losses(
        self, batch: LoopBatch, rollouts: Any = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """Losses of the objective and of the conversations, and what is to be logged.

        Args:
            batch: The batch.
            rollouts: What `roll_out` gave for it; ``None`` lets the objective make its own.
        """
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor | float] = {}
        regions = self._region_samples(batch)
        if rollouts is None and hasattr(self.objective, 'roll_out'):
            rollouts = self.roll_out(batch)
        elif rollouts is None:
            self._adapt_weights()
        if regions:
            part = batch.subset(regions)
            if rollouts is None:
                losses, metrics = self.objective(self, part)
            else:
                losses, metrics = self.objective.losses(self, part, rollouts)
        chats = [i for i, turns in enumerate(batch.conversations) if turns is not None]
        if chats and self.chat_weight > 0:
            losses['chat/caption_loss'] = self.chat_weight * self.chat_loss(batch, chats)
        if self.adaptive_weights is not None:
            metrics['loop1/weight'] = self.mask_to_caption_weight
            metrics['loop2/weight'] = self.caption_to_mask_weight
        if self.curriculum is not None:
            metrics['curriculum/samples'] = float(len(regions))
        return losses, metrics

    def _region_samples(self, batch: LoopBatch) -> list[int]:
        """Samples that have a region and that the curriculum lets through, one at least."""
        regions = [i for i, turns in enumerate(batch.conversations) if turns is None]
        if self.curriculum is None or not regions:
            return regions
        return self.curriculum.choose(
            regions,
            [float(batch.union_masks[i].float().mean()) for i in regions],
            [batch.captions[i] for i in regions],
            _iteration(),
        )

    def _adapt_weights(self) -> None:
        """Sets the weights of this step from the rewards of the last ones, alike on all ranks."""
        if self.adaptive_weights is None:
            return
        recent = torch.zeros(2, 2, device=self.device)  # sums and counts of the two directions
        hub = MessageHub.get_current_instance()
        for n, loop in enumerate(('loop1', 'loop2')):
            key = f'train/{loop}/reward_mean'
            if key in hub.log_scalars:
                recent[0, n] = hub.get_scalar(key).mean(self.adaptive_weights.window)
                recent[1, n] = 1
        all_reduce(recent)
        if not recent[1].all():
            return
        self.mask_to_caption_weight, self.caption_to_mask_weight = self.adaptive_weights.apply(
            self._weights, (recent[0] / recent[1]).tolist()
        )

    def train_step(
        self, data: Any, optim_wrapper: OptimWrapper, wrapper: Any = None
    ) -> dict[str, Any]:
        """One batch: one update, or ``num_iterations`` updates over the same rollouts.

        A step whose loss is not finite on any rank is skipped on all of them.

        Args:
            data: What the data loader gives.
            optim_wrapper: mmengine's.
            wrapper: What forward passes with a gradient go through (DDP, a DeepSpeed engine);
                ``None`` for this model itself.

        Returns:
            The losses over all ranks, for the log.

        Raises:
            RuntimeError: More than ``max_skipped_steps`` steps were skipped.
        """
        wrapper = self if wrapper is None else wrapper
        iterations = getattr(self.objective, 'num_iterations', 1)
        # DeepSpeed's has none: its engine knows itself when to exchange gradients.
        context = getattr(optim_wrapper, 'optim_context', lambda _: nullcontext())
        with context(wrapper):
            data = self.data_preprocessor(data, True)
            names = [meta.name for meta in data['data_samples']]
            batch = self.encode(data['data'], names)
            rollouts = self.roll_out(batch) if iterations > 1 else None
        for _ in range(iterations):
            with context(wrapper), phase('forward'):
                losses, metrics = wrapper(batch, rollouts, mode='objective')
            with phase('exchange'):
                agreed = agree(losses, metrics, batch.counts)
            losses = agreed.weigh(losses)
            unused = zero_of((p for p in self.parameters() if p.requires_grad), self.device)
            total = sum(losses.values(), start=unused)
            if getattr(self.objective, 'gradient_surgery', False):
                total, agreed.metrics['gradient_cosine'] = self._operate(losses, total)
            self._log(agreed)
            if not agreed.not_finite:
                with phase('optimizer'):
                    optim_wrapper.update_params(total)
            else:
                if hasattr(optim_wrapper, 'optim_context'):
                    optim_wrapper.zero_grad()
                self._count_skipped(agreed.not_finite)
        return {'loss': sum(agreed.losses.values()), **agreed.losses}

    def _operate(
        self, losses: Mapping[str, Tensor], total: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """A loss of the same value whose gradient is that of gradient surgery.

        It is linear in the parameters with the gradient as its factor, so that the optimizer
        wrapper's scaling and accumulation work as for any loss.
        """
        first, second = (
            [value for key, value in losses.items() if key.startswith(f'{loop}/')]
            for loop in ('loop1', 'loop2')
        )
        # All ranks have to agree to go on, since they add up their gradients below.
        both = torch.tensor(float(bool(first and second)), device=self.device)
        all_reduce(both, op='min')
        if not both:
            return total, math.nan
        parameters = [p for p in self.parameters() if p.requires_grad]
        gradients = []
        for terms in (first, second):
            found = torch.autograd.grad(
                sum(terms), parameters, retain_graph=True, allow_unused=True
            )
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
            for gradient in found:
                all_reduce(gradient, op='mean')
            gradients.append(found)
        projected, cosine = project_conflicting(*gradients)
        surrogate = sum(
            (parameter * (a + b)).sum()
            for parameter, a, b in zip(parameters, gradients[0], projected)
        )
        return total.detach() + surrogate - surrogate.detach(), cosine

    def _count_skipped(self, not_finite: Sequence[str]) -> None:
        self.skipped_steps += 1
        bad = ', '.join(not_finite)
        print_log(
            f'Step skipped: a loss is not finite ({bad}); {self.skipped_steps} so far',
            logger='current',
            level=logging.WARNING,
        )
        if self.skipped_steps > self.max_skipped_steps:
            raise RuntimeError(
                f'{self.skipped_steps} steps had a loss that is not finite ({bad}), '
                f'max_skipped_steps is {self.max_skipped_steps}: lower the learning rate, or look '
                'for bad data in the log'
            )

    def _log(self, agreed: Agreement) -> None:
        """To the message hub; not returned, since mmengine would optimise every ``loss`` again."""
        hub = MessageHub.get_current_instance()
        rows = {key: float(value) for key, value in agreed.metrics.items()}
        for key in ('loop1', 'loop2'):
            terms = [value for name, value in agreed.losses.items() if name.startswith(f'{key}/')]
            if terms:
                rows[f'{key}/loss'] = sum(terms)
        rows['total_loss'] = sum(agreed.losses.values())
        rows['skipped_steps'] = self.skipped_steps
        for key, value in rows.items():
            # A mean over nothing (no scorable reward, say) is left out rather than averaged.
            if math.isfinite(value):
                hub.update_scalar(f'train/{key}', value)

    @torch.no_grad()
    def predict(
        self, data: Mapping[str, Any], data_samples: Sequence[RegionMeta] | None = None
    ) -> list[dict[str, Any]]:
        """Both cycles of every sample, greedily: mask -> caption -> mask′, and back.

        Returns:
            A dict per sample: ``caption`` (generated), ``reference``, ``gt_mask`` ``(H, W)`` bool,
            and ``masks``: what the model finds for the generated caption (``'generated'``), the
            reference (``'reference'``) and another region's caption (``'distractor'``), each
            ``(H, W)`` bool on the CPU, where there is such a text; ``caption_return``: the greedy
            caption of the mask found for the reference, ``None`` without a reference.
        """
        names = None if data_samples is None else [meta.name for meta in data_samples]
        if self.predict_with == 'teacher':
            with self.teacher_applied():
                return self._predict(data, data_samples, names)
        return self._predict(data, data_samples, names)

    def _predict(
        self,
        data: Mapping[str, Any],
        data_samples: Sequence[RegionMeta] | None,
        names: Sequence[str] | None,
    ) -> list[dict[str, Any]]:
        with eval_mode(self.policy):
            batch = self.encode(data, names)
            if any(turns is not None for turns in batch.conversations):
                raise ValueError('the cycle needs regions: evaluate on data without conversations')
            written = self.write_captions(batch)
            # (sample, what, text, image): the generated caption is drawn on the target frame, the
            # others where they were written.
            jobs = [(i, 'generated', text, batch.target_image[i]) for i, text in enumerate(written)]
            for i, meta in enumerate(data_samples or []):
                for what, text in (('reference', meta.caption), ('distractor', meta.distractor)):
                    if text:
                        jobs.append((i, what, text, batch.image[i]))
            low_res, _ = self.segment_descriptions(
                batch,
                [strip_final_period(clean_caption(text)) for _, _, text, _ in jobs],
                [image for *_, image in jobs],
                [batch.names[i] for i, *_ in jobs],
            )
        results: list[dict[str, Any]] = [
            {
                'caption': text,
                'caption_return': None,
                'reference': batch.captions[i],
                'gt_mask': batch.union_masks[i].cpu(),
                'target_mask': batch.target_masks[i].cpu(),
                'masks': {},
            }
            for i, text in enumerate(written)
        ]
        for (i, what, _, _), logits in zip(jobs, low_res, strict=True):
            like = batch.target_masks[i] if what == 'generated' else batch.union_masks[i]
            mask = upsample_masks(logits[None, None], tuple(like.shape))[0, 0]
            results[i]['masks'][what] = mask.cpu()
        found = [i for i, result in enumerate(results) if 'reference' in result['masks']]
        if found:
            described = self.write_captions(
                batch,
                images=[batch.image[i] for i in found],
                prompt_masks=[
                    prompt_mask_grid(results[i]['masks']['reference'][None], self.policy.grid_size)
                    for i in found
                ],
                names=[batch.names[i] for i in found],
            )
            for i, text in zip(found, described, strict=True):
                results[i]['caption_return'] = text
        return results

    # ----------------------------------------------------------------- helpers

    @property
    def device(self) -> torch.device:
        """Where the policy lives."""
        return next(self.policy.parameters()).device

    def _image_tokens(self, batch: LoopBatch, image: int) -> int:
        return batch.features.num_tiles[image] * self.policy.num_image_tokens

    def shared_start(
        self, batch: LoopBatch, images: Sequence[int], prompt_ids: Sequence[int]
    ) -> int:
        """Positions that prompts about one of the images have in common: through its tokens.

        Args:
            batch: The batch.
            images: Of the prompts; the one with the fewest tokens says how much is certain.
            prompt_ids: One of the prompts; they differ behind the image only.
        """
        before = prompt_ids.index(self.policy.image_token_id)
        return before + min(self._image_tokens(batch, image) for image in images)

    def region_text(self, batch: LoopBatch, i: int) -> str:
        """The prompt that asks for a description of sample ``i``."""
        return self._region_text(batch, batch.image[i], batch.prompt_masks[i])

    def segmentation_text(self, batch: LoopBatch, i: int) -> str:
        """The prompt that asks for the mask of sample ``i``'s own caption."""
        description = self.strip_final_period(batch.captions[i])
        return segmentation_prompt(self._image_tokens(batch, batch.image[i]), description)

    def _region_text(self, batch: LoopBatch, image: int, prompt_masks: Tensor) -> str:
        counts = prompt_masks.flatten(1).sum(dim=1).tolist()
        return region_prompt(self._image_tokens(batch, image), counts)

    def _padded(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        ids, labels = zip(*pairs, strict=True)
        return pad_batch(ids, self.policy.pad_token_id, 'right', labels, device=self.device)


def _num_supervised(labels: Tensor) -> Tensor:
    """Tokens that `VideoLLaVASAMModel.caption_loss` is the mean over."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def _weight(direction: str, options: dict | None) -> float:
    options = {} if options is None else dict(options)
    weight = options.pop('weight', 1.0)
    for key in options:
        raise TypeError(f'{direction} has no option {key!r}: {nearest(key, ["weight"])}')
    if weight < 0:
        raise ValueError(f'{direction}.weight must not be negative, got {weight}')
    return float(weight)


def _iteration() -> int:
    """The runner's, so that what depends on it goes on after a resume."""
    hub = MessageHub.get_current_instance()
    return hub.get_info('iter') if 'iter' in hub.runtime_info else 0


def _from_options(cls: type, name: str, options: dict | None) -> Any:
    if options is None:
        return None
    known = [field.name for field in fields(cls)]
    for key in options:
        if key not in known:
            raise TypeError(f'{name} has no option {key!r}: {nearest(key, known)}')
    return cls(**options)


def _expect_trainable_only(module: DualLoopModel, incompatible_keys: Any) -> None:
    """Frozen tensors are not part of a training checkpoint, so their absence is no news."""
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    # xtuner's test command loads without looking: nothing at all where the model is wrapped (DDP).
    absent = {key.removeprefix('module.') for key in incompatible_keys.missing_keys} & trainable
    if absent == trainable:
        raise CheckpointError(
            f'none of the {len(trainable)} trained tensors is in the checkpoint: it is of another '
            'model, or several ranks test it by `xtuner test`; use tools/test.py'
        )
    missing = [key for key in incompatible_keys.missing_keys if key in trainable]
    incompatible_keys.missing_keys[:] = missing
