"""Regions that are shown, not drawn: a box, points, a scribble. SAM 2 makes masks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from projects.llava_sam2_rl.inference.pictures import Picture

#: Labels of SAM 2's prompt encoder.
_UPPER_LEFT, _LOWER_RIGHT = 2, 3


@dataclass(frozen=True)
class Box:
    """A box around an object, in pixels of the photograph as it is shown.

    Args:
        left: Its left side.
        top: Its upper side.
        right: Its right side.
        bottom: Its lower side.
    """

    left: float
    top: float
    right: float
    bottom: float

    def prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """Two corners ``(2, 2)`` float64, x and y, and their labels ``(2,)`` int64 for SAM 2."""
        corners = np.array([[self.left, self.top], [self.right, self.bottom]], np.float64)
        if not (corners[0] < corners[1]).all():
            raise ValueError(
                f'{self} has no inside: give left, top, right, bottom, with left < right and '
                'top < bottom'
            )
        return corners, np.array([_UPPER_LEFT, _LOWER_RIGHT])


@dataclass(frozen=True)
class Points:
    """Points on an object, in pixels of the photograph as it is shown.

    Args:
        points: ``((x, y), …)``, at least one.
        labels: 1 for a point on the object, 0 for one beside it, one each. Defaults to all 1.
    """

    points: tuple[tuple[float, float], ...]
    labels: tuple[int, ...] | None = None

    def prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """``(K, 2)`` float64, x and y, and their labels ``(K,)`` int64 for SAM 2."""
        points = _xy(self.points, self)
        labels = np.ones(len(points), int) if self.labels is None else np.array(self.labels)
        if len(labels) != len(points) or not np.isin(labels, (0, 1)).all() or not labels.any():
            raise ValueError(
                f'{self}: every point needs a label, 1 on the object or 0 beside it, and at least '
                'one point must be on it'
            )
        return points, labels


@dataclass(frozen=True)
class Scribble:
    """A stroke over an object, in pixels of the photograph as it is shown.

    Args:
        points: ``((x, y), …)``, joined by lines.
        num_points: How many points SAM 2 is given, at equal distances along the stroke. Defaults
            to 8.
    """

    points: tuple[tuple[float, float], ...]
    num_points: int = 8

    def prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """``(K, 2)`` float64, x and y, and their labels ``(K,)`` int64 for SAM 2, all 1."""
        points = _xy(self.points, self)
        if self.num_points < 1:
            raise ValueError(f'{self}: num_points must be at least 1')
        steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
        along = np.concatenate([[0.0], steps.cumsum()])
        if along[-1] == 0:  # it never moves
            return points[:1], np.ones(1, int)
        # Not its ends, which run over the object's border most often.
        at = (np.arange(self.num_points) + 0.5) / self.num_points * along[-1]
        sampled = np.stack([np.interp(at, along, points[:, axis]) for axis in (0, 1)], axis=1)
        return sampled, np.ones(self.num_points, int)


Region: TypeAlias = Picture | Box | Points | Scribble


def prompt_points(
    region: Box | Points | Scribble, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """What SAM 2 is given for a region of a photograph.

    Args:
        region: In pixels of the photograph.
        width: Of the photograph in pixels.
        height: Of the photograph in pixels.

    Returns:
        ``(K, 2)`` float64, x and y, and ``(K,)`` int64: 1 on the object, 0 beside it, 2 and 3 the
        corners of a box.

    Raises:
        ValueError: A point lies outside of the photograph, or the region has no point, no inside,
            or other labels.
    """
    points, labels = region.prompt()
    # Also false for what is no number.
    if not ((points >= 0) & (points <= (width, height))).all():
        raise ValueError(
            f'{region} reaches beyond the photograph, which is {width} x {height} pixels (width x '
            'height, turned as its EXIF tag says)'
        )
    return points, labels


def _xy(points: tuple[tuple[float, float], ...], region: Points | Scribble) -> np.ndarray:
    array = np.array(points, np.float64)
    if array.ndim != 2 or array.shape[1] != 2 or not len(array):
        raise ValueError(f'{region}: points must be one or more pairs of x and y')
    return array
