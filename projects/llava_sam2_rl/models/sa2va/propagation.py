"""A ``[SEG]`` through a clip: SAM 2's memory carries its mask beyond the prompted frames.

As the official Sa2VA segments videos (Ravi et al. 2024, "SAM 2: Segment Anything in Images and
Videos", with Sa2VA's settings of the memory): the first frames are prompted by the ``[SEG]``
embedding, each by itself. Every later frame looks back at the memories of those, at the last six
frames and at the object's pointers, and is not prompted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.llava_sam2_rl.models.sa2va.grounding import (
    DecodedObjects,
    GroundingEncoder,
    SamFeatures,
)

#: Frames that are prompted, and that the language model sees.
NUM_COND_FRAMES = 5


def propagate_frames(
    encoder: GroundingEncoder,
    frames: Iterable[Tensor | SamFeatures],
    seg_embeddings: Tensor,
    num_cond_frames: int = NUM_COND_FRAMES,
    memory_dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Tensor]:
    """The masks of O objects, frame by frame; memory does not grow with the clip.

    Args:
        encoder: SAM 2.
        frames: ``(3, s, s)`` uint8 RGB each, in order; a tensor ``(F, 3, s, s)`` or an iterator. A
            frame that was encoded already may come as its `SamFeatures`.
        seg_embeddings: ``(O, D)``, the projected hidden states at ``[SEG]``.
        num_cond_frames: How many of the first frames are prompted. Defaults to 5.
        memory_dtype: To which memories are rounded; officially bfloat16, the default.

    Yields:
        ``(O, s/4, s/4)`` float32 logits of each frame.

    Raises:
        ValueError: There is no frame, an option is out of range, or a frame has another size.
    """
    if num_cond_frames < 1:
        raise ValueError(f'num_cond_frames={num_cond_frames}: at least one frame is prompted')
    if seg_embeddings.ndim != 2 or seg_embeddings.shape[1] != encoder.hidden_dim:
        raise ValueError(
            f'seg_embeddings are {tuple(seg_embeddings.shape)}, expected (objects, '
            f'{encoder.hidden_dim})'
        )
    memory = _ClipMemory(encoder, len(seg_embeddings), memory_dtype)
    index = -1
    for index, frame in enumerate(frames):
        image = _Image.of(encoder, frame, index)
        is_prompted = index < num_cond_frames
        if is_prompted:
            embedding = image.features.embedding.expand(len(seg_embeddings), -1, -1, -1)
        else:
            embedding = memory.recall(image, index)
        decoded = encoder.decode_objects(
            embedding.to(encoder.dtype),
            [level.expand(len(seg_embeddings), -1, -1, -1) for level in image.high_res],
            seg_embeddings if is_prompted else None,
        )
        memory.remember(image, decoded, index, is_prompted)
        yield decoded.low_res
    if index < 0:
        raise ValueError('the clip has no frame')


def propagate(
    encoder: GroundingEncoder,
    frames: Tensor | Iterable[Tensor | SamFeatures],
    seg_embeddings: Tensor,
    num_cond_frames: int = NUM_COND_FRAMES,
    memory_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``(O, F, s/4, s/4)`` float32 logits of O objects in F frames; see `propagate_frames`."""
    masks = propagate_frames(encoder, frames, seg_embeddings, num_cond_frames, memory_dtype)
    return torch.stack(list(masks), dim=1)


@dataclass(frozen=True)
class _Image:
    """One frame's features, encoded once for all objects; a batch of one each."""

    features: SamFeatures
    high_res: list[Tensor]

    @classmethod
    def of(cls, encoder: GroundingEncoder, frame: Tensor | SamFeatures, index: int) -> _Image:
        if isinstance(frame, SamFeatures):
            if len(frame) != 1:
                raise ValueError(f'frame {index} holds the features of {len(frame)} images')
            return cls(frame, encoder.high_res(frame))
        if frame.ndim != 3:
            raise ValueError(f'frame {index} is {tuple(frame.shape)}, expected (3, height, width)')
        device = encoder.pixel_mean.device
        try:
            features = encoder.encode(frame[None].to(device))
        except ValueError as error:
            raise ValueError(f'frame {index}: {error}') from error
        return cls(features, encoder.high_res(features))

    @property
    def embedding(self) -> Tensor:
        return self.features.unconditioned


@dataclass
class _ClipMemory:
    """What is kept of the frames so far, in the form in which `SAM2Base` looks it up."""

    encoder: GroundingEncoder
    num_objects: int
    dtype: torch.dtype
    #: By frame: ``maskmem_features (O, C, h, w)``, ``maskmem_pos_enc``, ``obj_ptr (O, D)``.
    prompted: dict[int, dict[str, Any]] = field(default_factory=dict)
    propagated: dict[int, dict[str, Any]] = field(default_factory=dict)

    def recall(self, image: _Image, index: int) -> Tensor:
        """``(O, D, h, w)``: a frame's features after attending to what is remembered."""
        sam = self.encoder.sam2_model
        rows = [
            x.flatten(2).permute(2, 0, 1).expand(-1, self.num_objects, -1)
            for x in (image.embedding, image.features.position.to(image.embedding.dtype))
        ]
        return sam._prepare_memory_conditioned_features(
            frame_idx=index,
            is_init_cond_frame=False,
            current_vision_feats=rows[:1],
            current_vision_pos_embeds=rows[1:],
            feat_sizes=[image.embedding.shape[-2:]],
            output_dict={
                'cond_frame_outputs': self.prompted,
                'non_cond_frame_outputs': self.propagated,
            },
            # How far pointers reach back. A clip shorter than that has no frame further back.
            num_frames=max(index + 1, sam.max_obj_ptrs_in_encoder),
        )

    def remember(
        self, image: _Image, decoded: DecodedObjects, index: int, is_prompted: bool
    ) -> None:
        """Keeps a frame with its masks, and lets go of what no later frame looks back at."""
        sam = self.encoder.sam2_model
        size = self.encoder.image_size
        masks = F.interpolate(
            decoded.low_res[:, None], (size, size), mode='bilinear', align_corners=False
        )
        masks = masks.sigmoid() * sam.sigmoid_scale_for_mem_enc + sam.sigmoid_bias_for_mem_enc
        dtype = image.embedding.dtype
        encoded = sam.memory_encoder(
            image.embedding.expand(self.num_objects, -1, -1, -1),
            masks.to(dtype),
            skip_mask_sigmoid=True,
        )
        kept = self.prompted if is_prompted else self.propagated
        kept[index] = {
            'maskmem_features': encoded['vision_features'].to(self.dtype).to(dtype),
            'maskmem_pos_enc': [x.to(dtype) for x in encoded['vision_pos_enc']],
            'obj_ptr': self._pointer(decoded).to(dtype),
        }
        self.propagated.pop(index + 1 - sam.max_obj_ptrs_in_encoder, None)
        # Pointers reach further back than memories do.
        too_old = self.propagated.get(index + 1 - sam.num_maskmem)
        if too_old is not None:
            del too_old['maskmem_features'], too_old['maskmem_pos_enc']

    def _pointer(self, decoded: DecodedObjects) -> Tensor:
        """``(O, D)``: the chosen mask's token, or that of nothing where the object is not seen.

        The score switches nothing but this: Sa2VA's masks are not blanked by it.
        """
        sam = self.encoder.sam2_model
        is_there = (decoded.object_score > 0)[:, None]
        return torch.where(is_there, sam.obj_ptr_proj(decoded.token), sam.no_obj_ptr)
