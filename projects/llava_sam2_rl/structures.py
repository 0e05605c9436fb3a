"""The records that travel between the parts of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class RegionSample:
    """One region of one image, or of T frames of a clip, as a source reads it, before any resizing.

    T = 1 is an image. A pair of frames is T = 2: ``image2`` and ``mask2`` beside ``image`` and
    ``mask``. A clip goes on in ``more_images`` and ``more_masks``; see `of_clip` and `frames`.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        mask: ``(H, W)`` bool, or ``(R, H, W)`` bool where one caption speaks of R regions. R = 0
            with a caption: nothing in the image is what the caption describes (no target).
        caption: Reference description of the region(s); ``None`` where the source has none.
        region_captions: R descriptions, one for each region of a mask ``(R, H, W)`` and in that
            order, instead of one ``caption`` for all: each region is then a task of its own, and
            the texts are asked for in the turns of one conversation. Entries may be ``None``.
        seg_per_region: Whether ``caption`` is answered with a ``[SEG]`` for each of its R regions.
            Defaults to False: one ``[SEG]``, whose mask is their union.
        image2: ``(H2, W2, 3)`` uint8, RGB: another frame that shows the same object.
        mask2: ``(H2, W2)`` or ``(R, H2, W2)`` bool, the object(s) in ``image2``.
        more_images: The frames of a clip behind ``image2``, in order.
        more_masks: The object(s) in each of them; a mask without a pixel where a frame does not
            show them.
        source: Name of the data source.
        sample_id: Names the record within its source, for error messages and reports.
        category: Object class where the source knows it.
        attributes: What a full caption of the region has to name, by attribute (``{'size': 'small',
            'colour': 'red', …}``), where the source knows it; see `evaluation.attributes`.
        distractor: Reference description of another region of ``image``, where there is one; the
            evaluation asks for it too, to see whether the segmenter listens.
        conversation: ``(question, answer)`` turns about the whole image, free of markers; such a
            record has no region, its ``mask`` is ``(0, H, W)``.

    Raises:
        ValueError: A shape or dtype is not as above, only one of ``image2``, ``mask2`` is given, or
            frames and masks differ in number.
    """

    image: np.ndarray
    mask: np.ndarray
    caption: str | None = None
    image2: np.ndarray | None = None
    mask2: np.ndarray | None = None
    source: str = ''
    sample_id: str = ''
    category: str | None = None
    distractor: str | None = None
    conversation: tuple[tuple[str, str], ...] = ()
    region_captions: tuple[str | None, ...] = ()
    seg_per_region: bool = False
    attributes: Mapping[str, str] | None = None
    more_images: tuple[np.ndarray, ...] = ()
    more_masks: tuple[np.ndarray, ...] = ()

    @classmethod
    def of_clip(
        cls, images: Sequence[np.ndarray], masks: Sequence[np.ndarray], **fields: Any
    ) -> RegionSample:
        """A sample of T >= 1 frames with a mask each, in order.

        Args:
            images: T.
            masks: T.
            **fields: All others.
        """
        return cls(
            image=images[0],
            mask=masks[0],
            image2=images[1] if len(images) > 1 else None,
            mask2=masks[1] if len(masks) > 1 else None,
            more_images=tuple(images[2:]),
            more_masks=tuple(masks[2:]),
            **fields,
        )

    def __post_init__(self) -> None:
        self._check(self.image, self.mask, '')
        if (self.image2 is None) != (self.mask2 is None):
            raise ValueError(f'{self.name}: image2 and mask2 come together or not at all')
        if len(self.more_images) != len(self.more_masks):
            raise ValueError(
                f'{self.name}: {len(self.more_images)} more_images but {len(self.more_masks)} '
                'more_masks: give a mask for each'
            )
        if self.more_images and self.image2 is None:
            raise ValueError(f'{self.name}: more_images come behind image2, which is not there')
        for number, (image, mask) in enumerate(self.frames[1:], 2):
            self._check(image, mask, str(number))
            if self.num_regions != (1 if mask.ndim == 2 else len(mask)):
                raise ValueError(
                    f'{self.name}: mask and mask{number} hold different numbers of regions'
                )
        if self.region_captions:
            if self.caption is not None:
                raise ValueError(f'{self.name}: caption and region_captions exclude each other')
            if self.seg_per_region:
                raise ValueError(
                    f'{self.name}: seg_per_region is for one caption of several regions; '
                    'region_captions have a [SEG] each anyway'
                )
            if len(self.region_captions) != self.num_regions:
                raise ValueError(
                    f'{self.name}: {len(self.region_captions)} region_captions for '
                    f'{self.num_regions} regions: give one each'
                )

    def _check(self, image: np.ndarray, mask: np.ndarray, suffix: str) -> None:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f'{self.name}: image{suffix} must be (H, W, 3) uint8, '
                f'got {image.shape} {image.dtype}'
            )
        if mask.ndim not in (2, 3) or mask.dtype != np.bool_:
            raise ValueError(
                f'{self.name}: mask{suffix} must be (H, W) or (R, H, W) bool, '
                f'got {mask.shape} {mask.dtype}'
            )
        if mask.shape[-2:] != image.shape[:2]:
            raise ValueError(
                f'{self.name}: mask{suffix} is {mask.shape[-2:]}, image{suffix} {image.shape[:2]}'
            )

    @property
    def name(self) -> str:
        """``source/sample_id``, as every message about this record calls it."""
        return f'{self.source}/{self.sample_id}'

    @property
    def num_regions(self) -> int:
        """R, the number of regions the caption speaks of."""
        return 1 if self.mask.ndim == 2 else len(self.mask)

    @property
    def texts(self) -> tuple[str, ...]:
        """What is said of regions: ``caption``, or the texts of ``region_captions``."""
        given = self.region_captions or (self.caption,)
        return tuple(text for text in given if text and text.strip())

    @property
    def has_pair(self) -> bool:
        """Whether a second frame is there for the return trip."""
        return self.image2 is not None

    @property
    def frames(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """T frames with their masks, in order."""
        frames = [(self.image, self.mask)]
        if self.image2 is not None and self.mask2 is not None:
            frames.append((self.image2, self.mask2))
        return (*frames, *zip(self.more_images, self.more_masks, strict=True))

    @property
    def later_frame(self) -> int | None:
        """The last frame behind the first that shows every region, as an index into `frames`.

        ``None`` where there is none. On it the object is looked for again.
        """
        shown = [t for t, (_, mask) in enumerate(self.frames) if t and _shows_all(mask)]
        return shown[-1] if shown else None


def _shows_all(mask: np.ndarray) -> bool:
    """Whether every region of a mask ``(H, W)`` or ``(R, H, W)`` has a pixel."""
    return all(region.any() for region in (mask if mask.ndim == 3 else mask[None]))


@dataclass(frozen=True)
class RegionMeta:
    """What stays with a sample of a batch for logs, metrics and pictures.

    Args:
        source: Name of the data source.
        sample_id: Names the record within its source.
        caption: Reference caption or ``None``.
        category: Object class or ``None``.
        height: Rows of the original image.
        width: Columns of the original image.
        distractor: Reference description of another region of the image, or ``None``.
        attributes: Of `RegionSample`, or ``None``.
    """

    source: str
    sample_id: str
    caption: str | None
    category: str | None
    height: int
    width: int
    distractor: str | None = None
    attributes: Mapping[str, str] | None = None

    @property
    def name(self) -> str:
        """``source/sample_id``."""
        return f'{self.source}/{self.sample_id}'


#: A mask as COCO's compressed run-length code: ``{'size': [H, W], 'counts': bytes}``.
RunLengths: TypeAlias = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ClipSample:
    """An expression and the clip in which its object is to be found; pixels stay in their files.

    Args:
        source: Name of the data source.
        sample_id: Names the record within its source: ``video/expression``.
        video: Name of the clip, a folder.
        expression: Name of the expression within the clip.
        caption: What the expression says.
        frames: F pictures, in order.
        height: Rows of every frame.
        width: Columns of every frame.
        masks: F masks of what the expression refers to, ``None`` where a frame does not show it.
            ``None`` in place of all: the benchmark keeps them to itself.
        foreground: F masks of all objects of the clip that some expression refers to, where the
            benchmark has them. Defaults to None.
        group: Kind of the expression, where its benchmark tells kinds apart. Defaults to None.

    Raises:
        ValueError: There is no frame, or masks for another number of frames.
    """

    source: str
    sample_id: str
    video: str
    expression: str
    caption: str
    frames: tuple[Path, ...]
    height: int
    width: int
    masks: tuple[RunLengths | None, ...] | None = None
    foreground: tuple[RunLengths | None, ...] | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError(f'{self.name}: a clip without a frame')
        for name in ('masks', 'foreground'):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.frames):
                raise ValueError(f'{self.name}: {len(given)} {name} for {len(self.frames)} frames')

    @property
    def name(self) -> str:
        """``source/sample_id``."""
        return f'{self.source}/{self.sample_id}'


@dataclass(frozen=True, eq=False)
class MeanLoss:
    """A loss and the number of items it is the mean of, so that ranks can be averaged fairly.

    Args:
        value: Scalar with a gradient.
        count: Items (tokens, masks, completions) that ``value`` is the mean of on this rank; 0 =
            this rank has none. ``None`` (the default) = ranks are averaged as they are.
    """

    value: Tensor
    count: Tensor | float | None = None

    def weighted(self, weight: float) -> MeanLoss:
        """The same loss times ``weight``."""
        return MeanLoss(weight * self.value, self.count)
