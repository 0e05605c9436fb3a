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
from projects.llava_sam2_rl.models import VideoLLaVASAMModel
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


@torch.no_grad()
def segment_video(
    policy: VideoLLaVASAMModel,
    clip: Clip,
    text: str,
    max_new_tokens: int = 256,
    progress: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> VideoSegmentation:
    """Segments what a text names through a clip; greedily, as the official evaluation does.

    The language model sees the first five frames; SAM 2 is prompted there and carries the masks on.
    Frames are read as they are needed and not kept.

    Args:
        policy: The model, with a tokenizer.
        clip: See `read_frames`.
        text: A noun phrase, or a question (told by its ``?``).
        max_new_tokens: Maximum length of the answer in tokens. Defaults to 256.
        progress: Wraps the iterator over the frames, as `tqdm` does. Defaults to nothing.

    Raises:
        ValueError: The clip cannot be read, or the text has no word.
    """
    description = clean_caption(text)
    if not strip_final_period(description):
        raise ValueError(f'the text {text!r} names nothing: describe what to segment')
    if '?' not in description:
        description = strip_final_period(description)
    frames = read_frames(clip)
    seen = list(islice(frames, NUM_COND_FRAMES))
    size = (seen[0].shape[0], seen[0].shape[1])
    answer, prompts = _ask(policy, seen, description, max_new_tokens)
    every = progress(chain(seen, frames))
    if not len(prompts):
        return VideoSegmentation(answer, False, size, [[] for _ in every])
    side = policy.grounding_encoder.image_size
    pixels = (resize_bicubic(frame, side, side, exact=False) for frame in every)
    rles = []
    for low_res in propagate_frames(policy.grounding_encoder, pixels, prompts):
        # In two steps, as officially.
        whole = upsample_logits(low_res[:, None], (side, side))
        masks = upsample_masks(whole, size)[:, 0].cpu().numpy()
        rles.append([coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in masks])
    found = any(coco_mask.area(rle) > 0 for frame in rles for rle in frame)
    return VideoSegmentation(answer, found, size, rles)


def _ask(
    policy: VideoLLaVASAMModel,
    frames: Sequence[np.ndarray],
    description: str,
    max_new_tokens: int,
) -> tuple[str, Tensor]:
    """The answer about the first frames, and ``(P, 256)`` embeddings of its ``[SEG]``."""
    single = Sa2VATransform(**image_sizes(policy.config))
    everything = np.ones(frames[0].shape[:2], dtype=bool)
    tiles = [single(RegionSample(frame, everything))['pixel_values'] for frame in frames]
    features = policy.encode_images(
        {'pixel_values': [torch.cat(tiles).to(policy.device)]}, grounding=False
    )
    prompt = encode_prompt(
        policy.tokenizer,
        policy.chat_template.ask(clip_input(len(frames), policy.num_image_tokens, description)),
    )
    data = {
        **pad_batch([prompt], policy.pad_token_id, 'left', device=policy.device),
        'features': features,
    }
    new_ids = policy.generate(data, max_new_tokens)
    prompts, _ = policy.generated_seg_embeddings(data, new_ids)
    tokens = new_ids[0]
    said = decode_text(policy.tokenizer, tokens[tokens != policy.pad_token_id])
    return cut_at_stop(said, policy.stop_strings).strip(), prompts
