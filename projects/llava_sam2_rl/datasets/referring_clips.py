"""Expressions in clips as records of regions: what video benchmarks' training sets train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.meta_expressions import MetaExpressionsDataset
from projects.llava_sam2_rl.datasets.records import decode_rle, read_image
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample


@DATASETS.register_module()
class ReferringClipDataset(RegionDataset):
    """One record per expression of a video set; some of the video's frames are drawn each time.

    The frames are drawn without repeats and kept in order, as in the official training. Captions
    are asked of the first one and looked for again in another, so the first frame shows the
    object, and so does a later one where there is any; the others need not.

    Bad records, by reason: those of `MetaExpressionsDataset`; ``empty_mask`` where no frame shows
    the object, or the expression refers to none; what reading pictures and masks gives
    (``missing_image``, ``corrupt_image``, ``image_too_large``, ``bad_rle``).

    Args:
        dataset: A `MetaExpressionsDataset` with masks, or its config, as
            ``dict(type=MeViSDataset, split='train')``.
        num_frames: T, frames of a clip; fewer where the video has fewer. Defaults to 5, as
            officially.
        **kwargs: See :class:`RegionDataset`; the name of the source is that of ``dataset``.

    Raises:
        TypeError: ``dataset`` is none of expressions in clips.
        ValueError: ``num_frames`` is below 1, or the set keeps its masks to itself.
    """

    def __init__(self, dataset: Any, num_frames: int = 5, **kwargs: Any) -> None:
        if isinstance(dataset, Mapping):
            dataset = DATASETS.build(dataset)
        if not isinstance(dataset, MetaExpressionsDataset):
            raise TypeError(
                f'ReferringClipDataset reads expressions in clips (MeViSDataset, …), not a '
                f'{type(dataset).__name__}'
            )
        super().__init__(source=dataset.source, **kwargs)
        if num_frames < 1:
            raise ValueError(f'{self.source}: num_frames must be at least 1, got {num_frames}')
        if not dataset.has_masks:
            raise ValueError(
                f'{self.source} has no masks to train on: they are on the server of the benchmark; '
                "take split='train'"
            )
        self.dataset = dataset
        self.num_frames = num_frames

    @property
    def num_records(self) -> int:
        """Expressions."""
        return self.dataset.num_records

    def sample_id(self, index: int) -> str:
        """``video/expression``."""
        return self.dataset.sample_id(index)

    def image_key(self, index: int) -> str:
        """The video."""
        return self.dataset.image_key(index)

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Some frames of the video of expression ``index``, drawn by ``rng``.

        Raises:
            BadRecord: The record cannot be used.
        """
        clip = self.dataset.read_clip(index)
        codes = clip.masks or ()
        name = f'{self.source}/{clip.sample_id}'
        size = (clip.height, clip.width)
        shown = [t for t, code in enumerate(codes) if code is not None and coco_mask.area(code)]
        if not shown:
            raise BadRecord('empty_mask', name, 'no frame shows the object')
        images, masks = [], []
        for t in draw_frames(len(codes), shown, self.num_frames, rng):
            code = codes[t]
            images.append(read_image(clip.frames[t], name, size))
            masks.append(np.zeros(size, dtype=bool) if code is None else decode_rle(code, name))
        return RegionSample.of_clip(
            images,
            masks,
            caption=clip.caption,
            source=self.source,
            sample_id=clip.sample_id,
        )


def draw_frames(
    length: int, shown: Sequence[int], count: int, rng: np.random.Generator
) -> list[int]:
    """Frames of a video, ascending; the first shows the object, and a later one where one does.

    Args:
        length: Frames of the video.
        shown: Those that show the object, ascending, at least one.
        count: How many are drawn; fewer where there are fewer.
        rng: Draws them.
    """
    # Of a last frame alone nothing could be looked for again.
    starts = shown[:-1] or shown
    drawn = sorted(rng.permutation(np.arange(starts[0], length))[:count].tolist())
    # The nearest frame before the first one that shows the object takes its place.
    drawn[0] = max(t for t in starts if t <= drawn[0])
    later = [t for t in shown if t > drawn[0]]
    if len(drawn) > 1 and later and not set(later) & set(drawn):
        drawn[-1] = int(rng.choice(later))
    return sorted(drawn)
