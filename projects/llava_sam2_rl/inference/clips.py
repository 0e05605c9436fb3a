"""Clips as people have them: a video, a folder of frames, or the frames themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np

from projects.llava_sam2_rl.inference.pictures import Picture, load_image

#: A video file, a folder of numbered pictures, or pictures in order.
Clip: TypeAlias = str | Path | Iterable[Picture]

_PICTURES = ('.jpg', '.jpeg', '.png')
_VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.webm')


def is_clip(path: str | Path) -> bool:
    """Whether a path names a clip rather than a photograph: a folder, or a video by its suffix."""
    return Path(path).is_dir() or Path(path).suffix.lower() in _VIDEOS


def read_frames(clip: Clip) -> Iterator[np.ndarray]:
    """The frames of a clip one after another; no more than one is held.

    Args:
        clip: A video file, a folder whose pictures are taken in the order of their names, or
            pictures.

    Yields:
        ``(H, W, 3)`` uint8 RGB, all of one size.

    Raises:
        ValueError: There is no such file, it is no video or ends in the middle of a frame, a
            picture cannot be read, or one has another size than the first.
    """
    size: tuple[int, ...] | None = None
    number = -1
    for number, frame in enumerate(_frames(clip)):
        size = size or frame.shape[:2]
        if frame.shape[:2] != size:
            raise ValueError(
                f'frame {number} is {frame.shape[1]} x {frame.shape[0]} pixels, the first one '
                f'{size[1]} x {size[0]}: frames of a clip have one size'
            )
        yield frame
    if number < 0:
        raise ValueError(f'{_name(clip)} has no frame')


def frames_per_second(clip: Clip) -> float | None:
    """Of a video file; ``None`` where the clip is something else, or does not say."""
    if not isinstance(clip, str | Path) or Path(clip).is_dir():
        return None
    video = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG)
    try:
        return float(video.get(cv2.CAP_PROP_FPS)) or None
    finally:
        video.release()


def _name(clip: Clip) -> str:
    return str(clip) if isinstance(clip, str | Path) else 'the clip'


def _frames(clip: Clip) -> Iterator[np.ndarray]:
    if not isinstance(clip, str | Path):
        yield from map(load_image, clip)
        return
    path = Path(clip)
    if not path.exists():
        raise ValueError(f'there is no clip {path}')
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _PICTURES)
        yield from map(load_image, files)
        return
    yield from _decoded(path)


def _decoded(path: Path) -> Iterator[np.ndarray]:
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        if not video.isOpened():
            raise ValueError(f'{path} is damaged or no video: FFmpeg cannot open it')
        expected = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        number = 0
        while True:
            there, frame = video.read()
            if not there:
                break
            number += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if number < expected:
            raise ValueError(
                f'{path} ends after frame {number} of {expected}: it is cut off or damaged'
            )
    finally:
        video.release()
