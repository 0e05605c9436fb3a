"""What sources share that draw their pictures themselves."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from projects.llava_sam2_rl.datasets.base import RegionDataset
from projects.llava_sam2_rl.structures import RegionSample

SPLITS = ('train', 'val', 'test')


@dataclass(frozen=True, eq=False)
class Scene:
    """All objects of one generated picture.

    Args:
        image: (H, W, 3) uint8, RGB.
        masks: (N, H, W) bool, the visible part of each object; they do not overlap.
        captions: N reference captions, distinct within the scene.
        attributes: N dicts, the value of each attribute that captions name.
        image2: Second frame with every object moved, where the scene is paired.
        masks2: (N, H, W) bool, the same objects in ``image2``.
        more_images: The frames behind ``image2``, where the scene is a clip.
        more_masks: (N, H, W) bool, the same objects in each of them.
    """

    image: np.ndarray
    masks: np.ndarray
    captions: list[str]
    attributes: list[dict[str, str]]
    image2: np.ndarray | None = None
    masks2: np.ndarray | None = None
    more_images: tuple[np.ndarray, ...] = ()
    more_masks: tuple[np.ndarray, ...] = ()


def draw_kept(
    keys: Sequence[str], rng: np.random.Generator, keep_probability: float | Mapping[str, float]
) -> list[str]:
    """The attributes that a vague caption names, in their order.

    Args:
        keys: Attributes that it may leave out.
        rng: Draws which stay.
        keep_probability: Of each of them, independently; or one for each by its name.
    """
    if isinstance(keep_probability, Mapping):
        limits = [keep_probability[key] for key in keys]
    else:
        limits = [keep_probability] * len(keys)
    return [key for key, draw, limit in zip(keys, rng.random(len(keys)), limits) if draw < limit]


class GeneratedDataset(RegionDataset):
    """Base of sources that draw scenes of several objects.

    A scene is a function of ``(seed, split, index)`` alone. Each item asks for one object of it, or
    for some of them. A subclass implements `draw` and may override `asked`.

    Args:
        length: Scenes in the set.
        image_size: Side in pixels.
        num_objects: Fewest and most objects of a scene.
        paired: Adds a second frame in which every object has moved.
        max_shift: Farthest move along either axis, as a share of the side.
        split: ``'train'``, ``'val'`` or ``'test'``.
        num_regions: Most objects that an item asks for. More than 1 gives records with
            ``region_captions``, whose regions rewards can compare
            (``CaptionLikelihoodReward(contrast='other_region')``), without attributes. Defaults to
            1.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        ValueError: An option is out of range.
    """

    #: Fewest objects that a scene can be drawn of, and its least side in pixels.
    least_objects: ClassVar[int]
    least_size: ClassVar[int]
    #: The attribute that says what an object is.
    kind: ClassVar[str]

    def __init__(
        self,
        length: int,
        image_size: int,
        num_objects: tuple[int, int],
        paired: bool,
        max_shift: float,
        split: str,
        num_regions: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        low, high = num_objects
        if not self.least_objects <= low <= high <= 6:
            raise ValueError(
                f'num_objects must lie between {self.least_objects} and 6, got {tuple(num_objects)}'
            )
        if split not in SPLITS:
            raise ValueError(f'split must be one of {", ".join(SPLITS)}, got {split!r}')
        if length < 1 or image_size < self.least_size:
            raise ValueError(
                f'length must be at least 1 and image_size at least {self.least_size}, got '
                f'{length}, {image_size}'
            )
        if not 0 < max_shift <= 0.5:
            raise ValueError(f'max_shift must lie in (0, 0.5], got {max_shift}')
        if num_regions < 1:
            raise ValueError(f'num_regions must be at least 1, got {num_regions}')
        self.num_regions = num_regions
        self.length = length
        self.image_size = image_size
        self.num_objects = (low, high)
        self.paired = paired
        self.max_shift = max_shift
        self.split = split

    def draw(self, rng: np.random.Generator, count: int) -> Scene | None:
        """A scene of ``count`` objects; ``None`` where the draw breaks a rule."""
        raise NotImplementedError

    def asked(self, scene: Scene) -> list[int]:
        """The objects that an item may ask for. Defaults to all."""
        return list(range(len(scene.captions)))

    @property
    def num_records(self) -> int:
        """Scenes in the set."""
        return self.length

    def sample_id(self, index: int) -> str:
        """``split-index``; a sample adds the number of its object."""
        return f'{self.split}-{index}'

    def scene(self, index: int) -> Scene:
        """All objects of scene ``index`` at once."""
        rng = np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), index])
        low, high = self.num_objects
        count = int(rng.integers(low, high + 1))
        while True:  # ends with probability 1, after a handful of turns
            scene = self.draw(rng, count)
            if scene is not None:
                return scene

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """One object of scene ``index``, or some, drawn by ``rng``."""
        scene = self.scene(index)
        asked = self.asked(scene)
        if self.num_regions > 1:
            chosen = rng.permutation(asked)[: self.num_regions].tolist()
            said: dict[str, Any] = {'region_captions': tuple(scene.captions[n] for n in chosen)}
            numbers = chosen
        else:
            chosen = asked[int(rng.integers(len(asked)))]
            count = len(scene.captions)
            other = (chosen + 1 + int(rng.integers(count - 1))) % count
            said = {
                'caption': scene.captions[chosen],
                'category': scene.attributes[chosen][self.kind],
                'distractor': scene.captions[other],
                'attributes': scene.attributes[chosen],
            }
            numbers = [chosen]
        # A list of objects keeps an axis of them.
        return RegionSample(
            image=scene.image,
            mask=scene.masks[chosen],
            image2=scene.image2,
            mask2=None if scene.masks2 is None else scene.masks2[chosen],
            more_images=scene.more_images,
            more_masks=tuple(masks[chosen] for masks in scene.more_masks),
            source=self.source,
            sample_id='-'.join(map(str, (self.sample_id(index), *numbers))),
            **said,
        )
