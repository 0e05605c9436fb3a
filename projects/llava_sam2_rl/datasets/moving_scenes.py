"""Generated clips: the coloured shapes of `scenes` move, hide one another, cross and leave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.generated import Scene
from projects.llava_sam2_rl.datasets.scenes import (
    EXTENTS,
    SIZES,
    GeneratedScenes,
    reference_caption,
    render,
)
from projects.llava_sam2_rl.registry import DATASETS

#: How often the twins of a scene change places, an object leaves, and one passes over another.
CROSS, LEAVE, PASS = 0.7, 0.4, 0.6
#: Farthest that a path is bent aside, as a share of the side.
_BEND = 0.1


@dataclass(frozen=True)
class Path:
    """A quadratic Bézier curve from where an object is in the first frame, as shares of the side.

    Args:
        start: (x, y) at time 0.
        control: What the curve bends towards.
        end: (x, y) at time 1.
    """

    start: np.ndarray
    control: np.ndarray
    end: np.ndarray

    def at(self, time: float) -> tuple[float, float]:
        """Where the object is at a time of [0, 1]."""
        rest = 1 - time
        x, y = rest**2 * self.start + 2 * rest * time * self.control + time**2 * self.end
        return float(x), float(y)

    @classmethod
    def through(cls, start: np.ndarray, end: np.ndarray, place: np.ndarray, time: float) -> Path:
        """The curve that is at ``place`` at a time strictly between 0 and 1."""
        rest = 1 - time
        control = (place - rest**2 * start - time**2 * end) / (2 * rest * time)
        return cls(start, control, end)


@DATASETS.register_module()
class GeneratedMovingScenes(GeneratedScenes):
    """Clips of coloured shapes on a lightly textured background, with exact masks and captions.

    A clip is a function of ``(seed, split, index)`` alone. Each item asks for one object of it.
    Captions describe the first frame, in which every object is to be seen. Then each goes its way:
    in seven clips of ten two objects that look alike, or nearly so, change places; in four of ten
    one leaves the picture; in six of ten one passes over another; all others drift. A mask is the
    part that is to be seen, without a pixel where there is none. Items ask for objects that come
    up in a later frame again.

    Args:
        length: Clips in the set.
        image_size: Side in pixels.
        num_objects: Fewest and most objects of a clip, between 3 and 6.
        num_frames: T, frames of a clip; 1 gives pictures. Defaults to 4.
        max_shift: Farthest that an object drifts along either axis from the first frame to the
            last, as a share of the side. Defaults to 0.15.
        split: ``'train'``, ``'val'`` or ``'test'``; no combination of objects occurs in two splits.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        length: int,
        image_size: int = 128,
        num_objects: tuple[int, int] = (3, 5),
        num_frames: int = 4,
        max_shift: float = 0.15,
        split: str = 'train',
        source: str = 'moving_scenes',
        **kwargs: Any,
    ) -> None:
        super().__init__(
            length, image_size, num_objects, False, max_shift, split, source=source, **kwargs
        )
        if num_frames < 1:
            raise ValueError(f'num_frames must be at least 1, got {num_frames}')
        self.num_frames = num_frames

    def draw(self, rng: np.random.Generator, count: int) -> Scene | None:
        """A clip of ``count`` objects; ``None`` where the draw breaks a rule."""
        start = self.draw_start(rng, count)
        if start is None:
            return None
        objects, centres, background, colours = start
        # Only the first frame, which captions speak of, has to show everything.
        frames = [render(rng, self.image_size, background, objects, colours, centres)]
        paths = self._paths(rng, objects, centres)
        for t in range(1, self.num_frames):
            places = [path.at(t / (self.num_frames - 1)) for path in paths]
            frames.append(
                render(rng, self.image_size, background, objects, colours, places, max_hidden=1.0)
            )
        found = [frame for frame in frames if frame is not None]
        if len(found) < self.num_frames:
            return None
        images, masks = zip(*found, strict=True)
        scene = Scene(
            images[0],
            masks[0],
            [reference_caption(attributes) for attributes in objects],
            objects,
            images[1] if self.num_frames > 1 else None,
            masks[1] if self.num_frames > 1 else None,
            images[2:],
            masks[2:],
        )
        return scene if self.asked(scene) else None

    def asked(self, scene: Scene) -> list[int]:
        """Those that some frame behind the first shows."""
        every = super().asked(scene)
        if scene.masks2 is None:
            return every
        later = (scene.masks2, *scene.more_masks)
        return [n for n in every if any(masks[n].any() for masks in later)]

    def _paths(
        self,
        rng: np.random.Generator,
        objects: Sequence[dict[str, str]],
        centres: Sequence[tuple[float, float]],
    ) -> list[Path]:
        """Where each of N objects goes; the first two are the twins of a scene."""
        starts = np.array(centres)
        edges = [EXTENTS[o['shape']] * math.sqrt(SIZES[o['size']]) + 0.01 for o in objects]
        # All drift.
        ends = starts + rng.uniform(-self.max_shift, self.max_shift, starts.shape)
        ends = np.clip(ends, np.array(edges)[:, None], 1 - np.array(edges)[:, None])
        free = list(range(len(objects)))
        if rng.random() < CROSS:
            ends[[0, 1]] = starts[[1, 0]]
            free = free[2:]
        if rng.random() < LEAVE:
            leaves = free.pop(int(rng.integers(len(free))))
            ends[leaves] = _outside(rng, starts[leaves], edges[leaves])
        bends = rng.uniform(-_BEND, _BEND, starts.shape)
        paths = [
            Path(a, (a + b) / 2 + bend, b) for a, b, bend in zip(starts, ends, bends, strict=True)
        ]
        if free and self.num_frames > 2 and rng.random() < PASS:
            over = free[int(rng.integers(len(free)))]
            others = [n for n in range(len(objects)) if n != over]
            under = others[int(rng.integers(len(others)))]
            # They meet in a frame between the first and the last.
            time = int(rng.integers(1, self.num_frames - 1)) / (self.num_frames - 1)
            place = np.array(paths[under].at(time))
            paths[over] = Path.through(starts[over], ends[over], place, time)
        return paths


def _outside(rng: np.random.Generator, start: np.ndarray, edge: float) -> np.ndarray:
    """A place beyond the nearest border, so far that the object is gone before the clip ends."""
    axis = int(np.argmax(np.abs(start - 0.5)))
    border = -edge if start[axis] < 0.5 else 1 + edge
    end = start.copy()
    end[axis] = start[axis] + rng.uniform(1.2, 2.0) * (border - start[axis])
    return end
