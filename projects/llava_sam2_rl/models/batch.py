"""`RegionBatch`: B samples with their images encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.engine.timing import phase
from projects.llava_sam2_rl.models.sa2va.features import ImageFeatures
from projects.llava_sam2_rl.models.sa2va.grounding import SamFeatures
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel


@dataclass(frozen=True)
class RegionBatch:
    """B samples and the features of their images, which every pass of a step shares.

    A sample is a region of an image, with or without a caption; a caption that nothing in its image
    fits; or a conversation about the whole image. With a second frame (video) the return trip
    happens on that frame. A record that has a caption for each of R regions makes R samples. A clip
    has T frames: the language model looks at the first and at the second, that of the return trip,
    SAM 2 at all of them. Where the objective wants it, the language model can see all frames of a
    clip of more than two at once (``clips``).
    """

    #: Of all images of the batch: the B first frames, then the P second frames.
    features: ImageFeatures
    #: SAM 2's features of these, then of the M other frames of clips. ``None`` where no mask is
    #: wanted.
    frames: SamFeatures | None
    #: Of the C clips of more than two frames: the frames as the language model sees them, a tile
    #: each. ``None`` where the objective does not read them, or there is none.
    clips: ImageFeatures | None
    #: B reference captions, ``None`` where there is none.
    captions: list[str | None]
    #: B × ``(R, h, w)`` bool, the regions on the token grid of the first frame; R = 0 where nothing
    #: in the image is meant.
    prompt_masks: list[Tensor]
    #: B × ``(H, W)`` bool, the regions of the first frame, joined.
    gt_masks: list[Tensor]
    #: B × ``(K, H, W)`` bool, what the caption asks for, a mask for each ``[SEG]`` of its answer:
    #: the joined mask (K = 1), or R masks where the record wants one each.
    seg_masks: list[Tensor]
    #: B indices into ``features``: the first frames, in the order of the records.
    image: list[int]
    #: B indices into ``features``: where the return trip happens.
    target_image: list[int]
    #: B × ``(H, W)`` bool, what the return trip should find.
    target_masks: list[Tensor]
    #: B × ``(R, h, w)`` and ``(K, H, W)`` bool: as ``prompt_masks`` and ``seg_masks``, there.
    target_prompt_masks: list[Tensor]
    target_seg_masks: list[Tensor]
    #: B × T indices into ``frames``, in the order of the clip; T = 1 for an image.
    clip: list[list[int]]
    #: B × T × ``(K, H, W)`` bool: as ``seg_masks``, in each frame of the clip.
    clip_masks: list[list[Tensor]]
    #: B indices into ``clips``, ``None`` of what is no such clip.
    clip_image: list[int | None]
    #: B sample names for messages.
    names: list[str]
    #: B × ``(question, answer)`` turns, ``None`` for a region.
    conversations: list[Sequence[tuple[str, str]] | None]
    #: B numbers: neighbours with the same one are asked for in the turns of one conversation.
    dialogues: list[int]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def regions(self) -> list[int]:
        """The samples that are no conversation."""
        return [i for i, turns in enumerate(self.conversations) if turns is None]

    @property
    def describable(self) -> list[int]:
        """The samples that have a region to describe: all but conversations and no targets."""
        return [i for i in self.regions if len(self.prompt_masks[i])]

    @property
    def chats(self) -> list[int]:
        """The samples that are a conversation."""
        return [i for i, turns in enumerate(self.conversations) if turns is not None]

    @property
    def captioned(self) -> list[int]:
        """The samples that have a reference caption."""
        return [i for i, caption in enumerate(self.captions) if caption]

    def num_segs(self, samples: Sequence[int]) -> list[int]:
        """K of each of some samples: how many ``[SEG]`` answer their captions."""
        return [len(self.seg_masks[i]) for i in samples]

    def reference(self, sample: int) -> str:
        """The reference caption of a sample.

        Raises:
            ValueError: It has none.
        """
        caption = self.captions[sample]
        if caption is None:
            raise ValueError(f'sample {self.names[sample]!r} has no reference caption')
        return caption

    def subset(self, indices: Sequence[int]) -> RegionBatch:
        """Some of the samples; the features stay those of all images."""
        if len(indices) == len(self):
            return self
        chosen: dict[str, Any] = {
            name: [getattr(self, name)[i] for i in indices] for name in _per_sample()
        }
        return replace(self, **chosen)

    def on_target(self) -> RegionBatch:
        """The same samples, as they look in the frame of the return trip."""
        return replace(
            self,
            image=self.target_image,
            gt_masks=self.target_masks,
            prompt_masks=self.target_prompt_masks,
            seg_masks=self.target_seg_masks,
        )


def _per_sample() -> list[str]:
    """The fields of `RegionBatch` with an entry for each sample."""
    return [x.name for x in fields(RegionBatch) if x.name not in ('features', 'frames', 'clips')]


def encode_batch(
    policy: VideoLLaVASAMModel,
    data: Mapping[str, Any],
    names: Sequence[str] | None = None,
    clips_for_language: bool = False,
) -> RegionBatch:
    """Runs the frozen encoders once for every image of a batch.

    A record with ``region_captions`` becomes a sample for each of its R regions, named
    ``{name} region {1 … R}``; they share the image's features and one dialogue.

    Args:
        policy: The network.
        data: What `sa2va_collate` made.
        names: B names of the records for messages. Defaults to their numbers.
        clips_for_language: Whether all frames of clips are encoded for the language model too.
            Defaults to False.
    """
    pair, others = data.get('pair'), data.get('clip')
    count = len(data['captions'])
    images = {key: list(data[key]) for key in ('pixel_values', 'g_pixel_values')}
    vp_mask = [data['vp_overall_mask']]
    target_image = list(range(count))
    target_masks, target_grids = list(data['masks']), list(data['prompt_masks'])
    #: Of each record: frame number -> index into the features, and masks.
    clips = [{0: (i, masks)} for i, masks in enumerate(data['masks'])]
    if pair is not None:
        for position, sample in enumerate(pair['index'].tolist()):
            target_image[sample] = count + position
            target_masks[sample] = pair['masks'][position]
            target_grids[sample] = pair['prompt_masks'][position]
        _add_frames(clips, pair, count)
        for key in images:
            images[key] += list(pair[key])
        vp_mask.append(pair['vp_overall_mask'])
    seen = len(images['g_pixel_values'])
    if others is not None:
        _add_frames(clips, others, seen)
        images['g_pixel_values'] += list(others['g_pixel_values'])
    with phase('encode'):
        features = policy.encode_images({**images, 'vp_overall_mask': torch.cat(vp_mask)})
    clip_features: ImageFeatures | None = None
    clip_image: dict[int, int] = {}
    if others is not None and clips_for_language:
        clip_image = {record: k for k, record in enumerate(others['records'].tolist())}
        with phase('encode'):
            tiles = policy.encode_images({'pixel_values': list(others['pixel_values'])}, False)
        clip_features = replace(tiles, of_clips=True)
    frames = features.sam
    if others is not None and frames is not None:
        features = replace(features, sam=frames.select(slice(seen)))
    names = [str(i) for i in range(count)] if names is None else list(names)
    chats = data.get('conversations') or [None] * count
    each = data.get('region_captions') or [None] * count
    per_region = data.get('seg_per_region') or [False] * count
    samples: dict[str, list[Any]] = {name: [] for name in _per_sample()}
    for record in range(count):
        masks, targets, grids = data['masks'][record], target_masks[record], data['prompt_masks']
        captions, spans = [data['captions'][record]], [slice(None)]
        if each[record] is not None:
            captions = list(each[record])
            spans = [slice(k, k + 1) for k in range(len(captions))]
            if len(masks) != len(captions):
                raise ValueError(
                    f'sample {names[record]!r} has {len(masks)} masks but {len(captions)} '
                    'region_captions: give one each'
                )
        for k, (caption, span) in enumerate(zip(captions, spans, strict=True), 1):
            name = f'{names[record]} region {k}' if len(spans) > 1 else names[record]
            joined = masks[span].any(dim=0)
            each_seg = per_region[record] and len(masks[span]) > 1
            clip = [clips[record][t] for t in sorted(clips[record])]
            sample = {
                'captions': caption,
                'prompt_masks': grids[record][span],
                'gt_masks': joined,
                'seg_masks': _per_seg(masks[span], each_seg),
                'image': record,
                'target_image': target_image[record],
                'target_masks': targets[span].any(dim=0),
                'target_prompt_masks': target_grids[record][span],
                'target_seg_masks': _per_seg(targets[span], each_seg),
                'clip': [index for index, _ in clip],
                'clip_masks': [_per_seg(shown[span], each_seg) for _, shown in clip],
                'clip_image': clip_image.get(record),
                'names': name,
                'conversations': chats[record],
                'dialogues': record,
            }
            for key, value in sample.items():
                samples[key].append(value)
    return RegionBatch(features=features, frames=frames, clips=clip_features, **samples)


def _per_seg(masks: Tensor, each_seg: bool) -> Tensor:
    """Masks ``(R, H, W)`` as they are, for a ``[SEG]`` each, or joined to one."""
    return masks if each_seg else masks.any(dim=0)[None]


def _add_frames(
    clips: list[dict[int, tuple[int, Tensor]]], frames: Mapping[str, Any], first: int
) -> None:
    """Files frames of a collated batch under their records and numbers.

    Args:
        clips: Of each record: frame number -> index into the features, and masks.
        frames: ``index``, ``masks`` and ``frame``; where that is absent they are second frames.
        first: Index of the first of them.
    """
    records = frames['index'].tolist()
    numbers = frames['frame'].tolist() if 'frame' in frames else [1] * len(records)
    for k, (record, number) in enumerate(zip(records, numbers, strict=True)):
        clips[record][number] = (first + k, frames['masks'][k])
