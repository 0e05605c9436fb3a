"""`RegionBatch`: B samples with their images encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.engine.timing import phase
from projects.llava_sam2_rl.models.sa2va.features import ImageFeatures
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel


@dataclass(frozen=True)
class RegionBatch:
    """B samples and the features of their images, which every pass of a step shares.

    A sample is a region of an image, with or without a caption; a caption that nothing in its image
    fits; or a conversation about the whole image. With a second frame (video) the return trip
    happens on that frame. A record that has a caption for each of R regions makes R samples.
    """

    #: Of all images of the batch: the B first frames, then the P second frames.
    features: ImageFeatures
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
            x.name: [getattr(self, x.name)[i] for i in indices]
            for x in fields(self)
            if x.name != 'features'
        }
        return replace(self, **chosen)


def encode_batch(
    policy: VideoLLaVASAMModel, data: Mapping[str, Any], names: Sequence[str] | None = None
) -> RegionBatch:
    """Runs the frozen encoders once for every image of a batch.

    A record with ``region_captions`` becomes a sample for each of its R regions, named
    ``{name} region {1 … R}``; they share the image's features and one dialogue.

    Args:
        policy: The network.
        data: What `sa2va_collate` made.
        names: B names of the records for messages. Defaults to their numbers.
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
        features = policy.encode_images({**images, 'vp_overall_mask': torch.cat(vp_mask)})
    names = [str(i) for i in range(count)] if names is None else list(names)
    chats = data.get('conversations') or [None] * count
    each = data.get('region_captions') or [None] * count
    per_region = data.get('seg_per_region') or [False] * count
    samples: dict[str, list[Any]] = {
        x.name: [] for x in fields(RegionBatch) if x.name != 'features'
    }
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
            sample = {
                'captions': caption,
                'prompt_masks': grids[record][span],
                'gt_masks': joined,
                'seg_masks': masks[span] if each_seg else joined[None],
                'image': record,
                'target_image': target_image[record],
                'target_masks': targets[span].any(dim=0),
                'names': name,
                'conversations': chats[record],
                'dialogues': record,
            }
            for key, value in sample.items():
                samples[key].append(value)
    return RegionBatch(features=features, **samples)
