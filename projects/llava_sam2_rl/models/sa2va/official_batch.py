"""How an official Sa2VA batch says what belongs together; functions of the batch alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.models.sa2va.features import ImageFeatures
from projects.llava_sam2_rl.prompts import SEG


def prompt_plan(
    data: Mapping[str, Any], counts: Sequence[int], num_images: int
) -> tuple[list[int], list[int]]:
    """Which ``[SEG]`` prompts which grounding image: sample by sample, frame by frame.

    Args:
        data: Its ``frames_per_batch`` has an entry per sample, or per sample with ``[SEG]``.
        counts: Number of ``[SEG]`` of each sample.
        num_images: Number of grounding images.

    Returns:
        For each mask the number of its ``[SEG]`` and that of its image.
    """
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
    segs: list[int] = []
    images: list[int] = []
    seg_start = frame_start = 0
    for count, number in zip(counts, frames, strict=True):
        for frame in range(number):
            segs += range(seg_start, seg_start + count)
            images += [frame_start + frame] * count
        seg_start, frame_start = seg_start + count, frame_start + number
    return segs, images


def gt_masks(data: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
    """Ground truth in the order of the predictions (object-major -> frame by frame).

    Args:
        data: ``masks`` has an entry per sample: ``(P · frames, H, W)``, or ``None``.
        counts: Number P of ``[SEG]`` of each sample.
    """
    masks = data['masks']
    if len(masks) != len(counts):
        raise ValueError(f'{len(masks)} mask entries for {len(counts)} samples')
    frames = data.get('frames_per_batch') or [1] * len(counts)
    if len(frames) != len(counts):
        of_those_with_seg = iter(frames)
        frames = [next(of_those_with_seg) if count else 1 for count in counts]
    ordered: list[Tensor] = []
    for i, (mask, count, number) in enumerate(zip(masks, counts, frames, strict=True)):
        found = 0 if mask is None else len(mask)
        if found != count * number:
            raise ValueError(
                f'sample {sample_name(data.get("sample_ids"), i)}: {count} {SEG} × {number} '
                f'frames, but {found} ground-truth masks'
            )
        if count:
            by_object = mask.reshape(count, number, *mask.shape[-2:])
            ordered += list(by_object.transpose(0, 1).flatten(0, 1))
    return ordered


def align_prompt_masks(
    data: Mapping[str, Any], features: ImageFeatures
) -> list[Tensor | None] | None:
    """``prompt_masks`` with one entry per sample; the batch lists only samples with regions."""
    masks = data.get('prompt_masks')
    if masks is None or features.vp_flags is None:
        return None
    if len(masks) == len(features):
        return list(masks)
    flagged = [any(features.vp_flags[features.tiles_of(image)]) for image in range(len(features))]
    if sum(flagged) != len(masks):
        raise ValueError(f'{len(masks)} prompt_masks for {sum(flagged)} images with regions')
    remaining = iter(masks)
    return [next(remaining) if has else None for has in flagged]


def prompt_masks_of_sequences(
    data: Mapping[str, Any], features: ImageFeatures
) -> Sequence[Tensor | None] | None:
    """``prompt_masks`` with one entry per sequence.

    Where ``image_index`` says which image each sequence asks about, they have it already; else
    there is a sequence an image, see `align_prompt_masks`.
    """
    if data.get('image_index') is not None:
        return data.get('prompt_masks')
    return align_prompt_masks(data, features)


def left_padded(data: Mapping[str, Any], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` ``(B, N)`` with their padding moved to the left.

    Generation needs it there; the order of the tokens is kept.
    """
    attention_mask = data['attention_mask'].bool()
    order = attention_mask.long().argsort(dim=1, stable=True)
    ids = torch.where(attention_mask, data['input_ids'], pad_token_id)
    width = int(attention_mask.sum(dim=1).max())
    return ids.gather(1, order)[:, -width:], attention_mask.gather(1, order)[:, -width:]


def original_size(
    data: Mapping[str, Any], data_samples: Sequence[Any] | None, i: int, default: int
) -> tuple[int, int]:
    """``(H, W)`` of the image of sample ``i``: as its record says, else as its masks have it."""
    if data_samples is not None:
        return data_samples[i].height, data_samples[i].width
    if data.get('masks') is not None:
        height, width = data['masks'][i].shape[-2:]
        return height, width
    return default, default


def sample_name(sample_ids: Sequence[str] | None, i: int) -> str:
    """What an error calls sample ``i``."""
    return f'{i} of the batch' if sample_ids is None else repr(sample_ids[i])
