"""The first task: to describe a region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.generation import (
    Completions,
    Sampling,
    no_gradient,
    sample_completions,
)
from projects.llava_sam2_rl.models.prompting import (
    EmbeddedPrompts,
    conversation_prompts,
    region_prompts,
    region_prompts_with_captions,
    shared_length,
)
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.prompts import IGNORE_INDEX
from projects.llava_sam2_rl.structures import MeanLoss
from projects.llava_sam2_rl.utils.masks import cell_counts
from projects.llava_sam2_rl.utils.modules import eval_mode


def sample_captions(
    policy: VideoLLaVASAMModel, batch: RegionBatch, num_generations: int, sampling: Sampling
) -> Completions:
    """Draws G captions of each of the batch's B regions, without gradient."""
    prompts = region_prompts(policy, batch)
    return sample_completions(
        policy, prompts.embeds, prompts.attention_mask, num_generations, sampling
    )


def write_captions(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    max_new_tokens: int,
    *,
    images: Sequence[int] | None = None,
    prompt_masks: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
    **options: Any,
) -> list[str]:
    """Describes regions greedily, without gradient and without dropout.

    Args:
        policy: The network.
        batch: The batch.
        max_new_tokens: Longest caption in tokens.
        images: N indices into ``batch.features``. Defaults to the B first frames.
        prompt_masks: N × ``(R, h, w)`` bool. Defaults to the batch's own regions. A region without
            a cell (an empty predicted mask) is described by nothing: ``''``.
        names: N sample names. Defaults to the batch's own.
        **options: Of `Sampling`.

    Returns:
        N captions, cleaned of markers.
    """
    images = batch.image if images is None else images
    names = batch.names if names is None else names
    rows = list(range(len(images)))
    if prompt_masks is None:
        prompt_masks = batch.prompt_masks
    else:
        rows = [i for i, counts in enumerate(cell_counts(prompt_masks)) if all(counts)]
    captions = [''] * len(images)
    if not rows:
        return captions
    images = [images[i] for i in rows]
    sampling = Sampling(max_new_tokens=max_new_tokens, greedy=True, **options)
    with eval_mode(policy), no_gradient():
        prompts = region_prompts(
            policy, batch, images, [prompt_masks[i] for i in rows], [names[i] for i in rows]
        )
        first = prompts.input_ids[0][prompts.attention_mask[0]].tolist()
        completions = sample_completions(
            policy,
            prompts.embeds,
            prompts.attention_mask,
            1,
            sampling,
            shared=shared_length(policy, batch, images, first),
            sources=images,
        )
    for i, text in zip(rows, completions.texts, strict=True):
        captions[i] = text
    return captions


def caption_loss(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    samples: Sequence[int],
    prompt_masks: Sequence[Tensor] | None = None,
    cell_weights: Sequence[Tensor] | None = None,
    questions: Sequence[str] | None = None,
) -> MeanLoss:
    """Cross-entropy of the reference captions of some samples, a mean over their tokens.

    Args:
        policy: The network.
        batch: The batch.
        samples: N indices of samples that have a caption.
        prompt_masks: N × ``(R, h, w)`` bool. Defaults to the samples' own regions.
        cell_weights: See `VideoLLaVASAMModel.embed`.
        questions: N questions with ``region{i}``. Defaults to the policy's own.
    """
    captions = [batch.reference(i) for i in samples]
    prompts = region_prompts_with_captions(
        policy, batch, samples, captions, prompt_masks, cell_weights, questions
    )
    return _cross_entropy(policy, prompts)


def conversation_loss(
    policy: VideoLLaVASAMModel, batch: RegionBatch, samples: Sequence[int]
) -> MeanLoss:
    """Cross-entropy of the answers of conversations about whole images.

    Args:
        policy: The network.
        batch: The batch.
        samples: Indices of samples that have a conversation.
    """
    return _cross_entropy(policy, conversation_prompts(policy, batch, samples))


def caption_logits(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    samples: Sequence[int],
    captions: Sequence[Sequence[int]],
) -> Tensor:
    """``(ΣL, V)`` logits of every caption position; position t is predicted from t-1.

    Args:
        policy: The network.
        batch: The batch.
        samples: N indices of samples.
        captions: Their N captions as token ids, none empty.
    """
    prompts = region_prompts_with_captions(policy, batch, samples, captions)
    hidden = policy.hidden_states(prompts.embeds, prompts.attention_mask, prompts.position_ids)
    spans = []
    for row, real, ids in zip(hidden, prompts.attention_mask, captions, strict=True):
        # One to the left: the last token of the prompt predicts the first of the caption.
        end = int(real.sum()) - 1
        spans.append(row[end - len(ids) : end])
    return policy.lm_head(torch.cat(spans))


def _cross_entropy(policy: VideoLLaVASAMModel, prompts: EmbeddedPrompts) -> MeanLoss:
    hidden = policy.hidden_states(prompts.embeds, prompts.attention_mask, prompts.position_ids)
    # The first position is predicted by nothing.
    count = (prompts.labels[:, 1:] != IGNORE_INDEX).sum()
    return MeanLoss(policy.caption_loss(hidden, prompts.labels), count)
