"""Which frames of a video show an object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from projects.llava_sam2_rl.datasets.records import fit_mask


def check_gap(gap: Sequence[int | None], source: str) -> tuple[int, int | None]:
    """``gap`` as (least, most) frames from one to the other; ``None`` sets no upper limit.

    Raises:
        ValueError: It is not that.
    """
    least, most = gap
    if least is None or least < 1 or (most is not None and most < least):
        raise ValueError(
            f'{source}: pair_gap is (least, most) with 1 <= least <= most, got {tuple(gap)}'
        )
    return least, most


def draw_pair(
    frames: Sequence[int] | np.ndarray,
    gap: tuple[int, int | None],
    rng: np.random.Generator,
) -> tuple[int, int] | None:
    """Two of ``frames``, the earlier one first, every pair within ``gap`` equally likely.

    Args:
        frames: Ascending numbers.
        gap: See :func:`check_gap`.
        rng: Draws the pair.

    Returns:
        The numbers of both, or ``None`` where no pair is that far apart.
    """
    frames = np.asarray(frames, dtype=np.int64)
    least, most = gap
    first = np.searchsorted(frames, frames + least)
    last = (
        np.full(len(frames), len(frames))
        if most is None
        else np.searchsorted(frames, frames + most, side='right')
    )
    ends = np.cumsum(last - first)
    if not len(ends) or not ends[-1]:
        return None
    drawn = int(rng.integers(ends[-1]))
    earlier = int(np.searchsorted(ends, drawn, side='right'))
    later = int(last[earlier]) - (int(ends[earlier]) - drawn)
    return int(frames[earlier]), int(frames[later])


def draw_shown_pair(
    frames: Sequence[int] | np.ndarray,
    gap: tuple[int, int | None],
    read_mask: Callable[[int], np.ndarray],
    rng: np.random.Generator,
) -> dict[int, np.ndarray]:
    """As :func:`draw_pair`, of the frames whose mask is not empty; masks are read as needed.

    Args:
        frames: Ascending numbers.
        gap: See :func:`check_gap`.
        read_mask: Gives the (H, W) bool mask of a frame.
        rng: Draws the pair.

    Returns:
        Two frame numbers with their masks, the earlier one first. Where no pair is that far
        apart, one of the frames that show the object, or nothing where none does.
    """
    left = [int(frame) for frame in frames]
    masks: dict[int, np.ndarray] = {}
    while left:
        drawn = draw_pair(left, gap, rng) or (left[int(rng.integers(len(left)))],)
        for frame in drawn:
            if frame not in masks:
                masks[frame] = read_mask(frame)
        empty = [frame for frame in drawn if not masks[frame].any()]
        if not empty:
            return {frame: masks[frame] for frame in drawn}
        left = [frame for frame in left if frame not in empty]
    return {}


def spread_frames(frames: Sequence[int], first: int, last: int, count: int) -> list[int]:
    """``first``, ``last``, and others of ``frames`` between them, evenly spread.

    Args:
        frames: Ascending numbers, both ends among them.
        first: The first of them.
        last: The last of them; the same gives one frame.
        count: How many there are to be, at least 2; where there are fewer, all.
    """
    between = [int(frame) for frame in frames if first <= frame <= last]
    if len(between) <= count:
        return between
    chosen = np.linspace(0, len(between) - 1, count).round().astype(int)
    return [between[k] for k in chosen]


def fit_masks(
    masks: Iterable[np.ndarray], images: Iterable[np.ndarray], record: str
) -> list[np.ndarray]:
    """Each mask brought to the size of its image, nearest.

    Raises:
        BadRecord: ``mask_aspect``, where one has another aspect.
    """
    return [fit_mask(mask, image, record) for mask, image in zip(masks, images, strict=True)]
