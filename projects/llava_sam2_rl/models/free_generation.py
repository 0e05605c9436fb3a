"""Questions put to Sa2VA as a user puts them: it writes freely, and what it writes is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.prompts import (
    clean_caption,
    clip_region_input,
    decode_text,
    encode_prompt,
    pad_batch,
    region_input,
    segmentation_input,
    strip_final_period,
    truncate_at_stop,
)


@dataclass(frozen=True, eq=False)
class SegmentationAnswer:
    """What the model said to a segmentation question, and what it meant.

    Args:
        text: The answer, markers included.
        mask: ``(H, W)`` bool on the CPU: the masks of all ``[SEG]`` in the answer, joined, as in
            the official evaluation; empty where it has none.
        num_seg: Number of ``[SEG]`` in the answer.
        masks: ``(num_seg, H, W)`` bool on the CPU, the mask of each.
    """

    text: str
    mask: Tensor
    num_seg: int
    masks: Tensor


@torch.no_grad()
def answer_segmentation(
    policy: VideoLLaVASAMModel,
    data: Mapping[str, Any],
    descriptions: Sequence[str],
    data_samples: Sequence[Any],
    max_new_tokens: int = 256,
    question: str | None = None,
) -> list[SegmentationAnswer]:
    """Asks for a mask by text, generates the answer, and segments its ``[SEG]``.

    Args:
        policy: The model, with a tokenizer.
        data: What `sa2va_collate` made of N samples; ``pixel_values``, ``g_pixel_values`` and
            ``vp_overall_mask`` are used. ``image_index``: B numbers, which of the images each
            question is about; without it there is a question for each, B = N.
        descriptions: B noun phrases; markers in them are removed, so is a final full stop.
        data_samples: B objects with ``height`` and ``width`` of the original images.
        max_new_tokens: Maximum length of an answer in tokens. Defaults to 256.
        question: Holds ``{description}``. Defaults to the policy's own.

    Returns:
        B answers. Greedy.
    """
    question = policy.questions.segmentation if question is None else question
    features = policy.encode_images(data)
    image_index = data.get('image_index') or list(range(len(features)))
    prompts = [
        encode_prompt(
            policy.tokenizer,
            policy.chat_template.ask(
                segmentation_input(
                    features.num_tiles[image] * policy.num_image_tokens,
                    strip_final_period(clean_caption(d)),
                    question,
                )
            ),
        )
        for image, d in zip(image_index, descriptions, strict=True)
    ]
    device = features.vit.device
    tokenizer: Any = policy.tokenizer
    predictions = policy.predict(
        {
            **pad_batch(prompts, policy.pad_token_id, 'left', device=device),
            'features': features,
            'image_index': image_index,
        },
        data_samples,
        max_new_tokens=max_new_tokens,
    )
    answers = []
    for prediction in predictions:
        tokens = prediction['token_ids']
        text = decode_text(tokenizer, tokens[tokens != policy.pad_token_id])
        masks = prediction['masks']
        answers.append(SegmentationAnswer(text.strip(), masks.any(dim=0), len(masks), masks))
    return answers


@torch.no_grad()
def describe_regions(
    policy: VideoLLaVASAMModel,
    data: Mapping[str, Any],
    names: Sequence[str] | None = None,
    max_new_tokens: int = 256,
    of_clips: bool = False,
) -> list[str]:
    """Describes the regions of each sample, greedily.

    Args:
        policy: The model, with a tokenizer.
        data: What `sa2va_collate` made of N samples; ``pixel_values``, ``vp_overall_mask`` and
            ``prompt_masks`` are used. ``image_index``: B numbers, which of the images each entry
            of ``prompt_masks`` belongs to; without it there is an entry for each, B = N.
        names: B sample names for messages. Defaults to their numbers.
        max_new_tokens: Maximum length of a description in tokens. Defaults to 256.
        of_clips: Whether the tiles of a sample are frames of a clip, each an image of its own in
            the text; ``vp_overall_mask`` says which one the regions are marked in. Defaults to
            False.

    Returns:
        B cleaned captions.
    """
    features = policy.encode_images(data, grounding=False)
    image_index = data.get('image_index') or list(range(len(features)))
    tokenizer: Any = policy.tokenizer
    prompts = []
    for image, grid in zip(image_index, data['prompt_masks'], strict=True):
        tiles, tokens = features.num_tiles[image], policy.num_image_tokens
        cells, question = grid.flatten(1).sum(dim=1).tolist(), policy.questions.region
        asked = (
            clip_region_input(tiles, tokens, cells, question)
            if of_clips
            else region_input(tiles * tokens, cells, question)
        )
        prompts.append(encode_prompt(policy.tokenizer, policy.chat_template.ask(asked)))
    new_ids = policy.generate(
        {
            **pad_batch(prompts, policy.pad_token_id, 'left', device=features.vit.device),
            'features': features,
            'prompt_masks': data['prompt_masks'],
            'sample_ids': names,
            'image_index': image_index,
        },
        max_new_tokens=max_new_tokens,
        # An image or mask marker is no word of a description.
        suppress_tokens=list(policy.special_token_ids.values()),
    )
    texts, _ = truncate_at_stop(new_ids, tokenizer, policy.stop_strings)
    return [clean_caption(text) for text in texts]
