"""Sa2VA on clips: what a text names is found in the first frames and followed through the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from projects.llava_sam2_rl.datasets.transforms import Sa2VATransform, resize_bicubic
from projects.llava_sam2_rl.inference.clips import Clip, read_frames
from projects.llava_sam2_rl.inference.pictures import Picture, load_mask
from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.free_generation import describe_regions
from projects.llava_sam2_rl.models.sa2va.masks import upsample_logits, upsample_masks
from projects.llava_sam2_rl.models.sa2va.propagation import NUM_COND_FRAMES, propagate_frames
from projects.llava_sam2_rl.prompts import (
    clean_caption,
    clip_input,
    cut_at_stop,
    decode_text,
    encode_prompt,
    pad_batch,
    strip_final_period,
)
from projects.llava_sam2_rl.structures import RegionSample
from projects.llava_sam2_rl.utils.pretrained import image_sizes


@dataclass(frozen=True)
class VideoSegmentation:
    """What was found for a text in a clip of F frames.

    Masks are kept as COCO's run lengths, so that a long clip takes little memory.

    Args:
        answer: What the model said, a ``[SEG]`` for each object.
        found: Whether a frame has a mask with a pixel.
        size: ``(H, W)`` of the frames.
        rles: F frames of P objects, each ``{'size', 'counts'}`` (pycocotools); P may be 0.
    """

    answer: str
    found: bool
    size: tuple[int, int]
    rles: list[list[dict[str, Any]]]

    def __len__(self) -> int:
        return len(self.rles)

    def mask(self, frame: int) -> np.ndarray:
        """``(H, W)`` bool: all objects of a frame together."""
        return np.any(self.object_masks(frame), axis=0)

    def object_masks(self, frame: int) -> np.ndarray:
        """``(P, H, W)`` bool: each object of a frame by itself."""
        rles = self.rles[frame]
        if not rles:
            return np.zeros((0, *self.size), dtype=bool)
        return coco_mask.decode(rles).transpose(2, 0, 1).astype(bool)

    @property
    def masks(self) -> np.ndarray:
        """``(F, H, W)`` bool: all objects together, all frames at once."""
        return np.stack([self.mask(frame) for frame in range(len(self))])


def segment_video(
    policy: VideoLLaVASAMModel,
    clip: Clip,
    text: str,
    max_new_tokens: int = 256,
    progress: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> VideoSegmentation:
    """Segments what a text names through a clip; `segment_texts` of one text."""
    return segment_texts(policy, clip, [text], max_new_tokens, progress)[0]


@torch.no_grad()
def segment_texts(
    policy: VideoLLaVASAMModel,
    clip: Clip,
    texts: Sequence[str],
    max_new_tokens: int = 256,
    progress: Callable[[Iterator[Any]], Iterator[Any]] = iter,
    max_objects: int | None = None,
) -> list[VideoSegmentation]:
    """Segments what texts name through a clip; greedily, as the official evaluation does.

    The language model sees the first five frames; SAM 2 is prompted there and carries the masks on.
    Frames are read as they are needed and not kept, and encoded once for all texts; memory grows
    with the number of objects.

    Args:
        policy: The model, with a tokenizer.
        clip: See `read_frames`.
        texts: N noun phrases, or questions (told by their ``?``).
        max_new_tokens: Maximum length of an answer in tokens. Defaults to 256.
        progress: Wraps the iterator over the frames, as `tqdm` does. Defaults to nothing.
        max_objects: Number of ``[SEG]`` of an answer that are followed, the first ones; ``None``:
            all. Defaults to None.

    Returns:
        N answers with their masks.

    Raises:
        ValueError: The clip cannot be read, or a text has no word.
    """
    descriptions = [_description(text) for text in texts]
    frames = read_frames(clip)
    seen = list(islice(frames, NUM_COND_FRAMES))
    size = (seen[0].shape[0], seen[0].shape[1])
    answers, prompts = _ask(policy, seen, descriptions, max_new_tokens)
    prompts = [own[:max_objects] for own in prompts]
    counts = [len(own) for own in prompts]
    every = progress(chain(seen, frames))
    rles: list[list[list[dict[str, Any]]]] = [[] for _ in texts]
    if any(counts):
        side = policy.grounding_encoder.image_size
        pixels = (resize_bicubic(frame, side, side, exact=False) for frame in every)
        for low_res in propagate_frames(policy.grounding_encoder, pixels, torch.cat(prompts)):
            # In two steps, as officially.
            whole = upsample_logits(low_res[:, None], (side, side))
            masks = upsample_masks(whole, size)[:, 0].cpu().numpy().astype(np.uint8)
            encoded = iter([coco_mask.encode(np.asfortranarray(mask)) for mask in masks])
            for own, count in zip(rles, counts, strict=True):
                own.append(list(islice(encoded, count)))
    else:
        # The clip is read to its end: its length is part of the answer.
        length = sum(1 for _ in every)
        rles = [[[] for _ in range(length)] for _ in texts]
    return [
        VideoSegmentation(answer, _shows(own), size, own)
        for answer, own in zip(answers, rles, strict=True)
    ]


def describe_video(
    policy: VideoLLaVASAMModel,
    clip: Clip,
    masks: Sequence[Picture | None],
    max_new_tokens: int = 256,
) -> str:
    """Describes an object of a clip; see `Sa2VA.describe_video`."""
    frames = read_frames(clip)
    number = -1
    for number, (frame, mask) in enumerate(zip(frames, masks)):
        region = None if mask is None else load_mask(mask)
        if region is not None and region.shape != frame.shape[:2]:
            raise ValueError(
                f'the mask of frame {number} is {region.shape[1]} x {region.shape[0]} pixels, the '
                f'frame {frame.shape[1]} x {frame.shape[0]} (width x height)'
            )
        if region is not None and region.any():
            break
    else:
        raise ValueError(
            f'none of the masks of {number + 1} frames has a pixel: there is nothing to describe'
        )
    shown = [frame, *islice(frames, NUM_COND_FRAMES - 1)]
    single = Sa2VATransform(**image_sizes(policy.config))
    data = {
        'pixel_values': [frame_tiles(policy, shown)],
        'vp_overall_mask': torch.tensor([True] + [False] * (len(shown) - 1)),
        'prompt_masks': [single(RegionSample(frame, region))['prompt_masks'].to(policy.device)],
    }
    (caption,) = describe_regions(policy, data, max_new_tokens=max_new_tokens, of_clips=True)
    return caption


def _shows(rles: Sequence[Sequence[dict[str, Any]]]) -> bool:
    return any(coco_mask.area(rle) > 0 for frame in rles for rle in frame)


def _description(text: str) -> str:
    """A text as it is asked for.

    Raises:
        ValueError: It has no word.
    """
    description = clean_caption(text)
    if not strip_final_period(description):
        raise ValueError(f'the text {text!r} names nothing: describe what to segment')
    return description if '?' in description else strip_final_period(description)


def _ask(
    policy: VideoLLaVASAMModel,
    frames: Sequence[np.ndarray],
    descriptions: Sequence[str],
    max_new_tokens: int,
) -> tuple[list[str], list[Tensor]]:
    """N answers about the first frames, and N × ``(P, 256)``, the embeddings of their ``[SEG]``."""
    features = policy.encode_images({'pixel_values': [frame_tiles(policy, frames)]}, False)
    prompts = [
        encode_prompt(
            policy.tokenizer,
            policy.chat_template.ask(clip_input(len(frames), policy.num_image_tokens, description)),
        )
        for description in descriptions
    ]
    data = {
        **pad_batch(prompts, policy.pad_token_id, 'left', device=policy.device),
        'features': features,
        # All are asked about the one clip.
        'image_index': [0] * len(prompts),
    }
    new_ids = policy.generate(data, max_new_tokens)
    embeddings, counts = policy.generated_seg_embeddings(data, new_ids)
    said = [decode_text(policy.tokenizer, ids[ids != policy.pad_token_id]) for ids in new_ids]
    answers = [cut_at_stop(text, policy.stop_strings).strip() for text in said]
    return answers, list(embeddings.split(counts))


def frame_tiles(policy: VideoLLaVASAMModel, frames: Sequence[np.ndarray]) -> Tensor:
    """``(F, 3, S, S)`` on the model's device: frames for the vision model, a tile each."""
    single = Sa2VATransform(**image_sizes(policy.config))
    everything = np.ones(frames[0].shape[:2], dtype=bool)
    tiles = [single(RegionSample(frame, everything))['pixel_values'] for frame in frames]
    return torch.cat(tiles).to(policy.device)
