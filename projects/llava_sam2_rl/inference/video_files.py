"""What was found in a clip, as files: masks, run lengths, and the clip with the masks on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
from PIL import Image

from projects.llava_sam2_rl.inference.clips import Clip, frames_per_second, read_frames
from projects.llava_sam2_rl.inference.video import VideoSegmentation
from projects.llava_sam2_rl.utils.drawing import FOUND, overlay

#: Of the drawn clip, where the clip itself does not say.
FRAMES_PER_SECOND = 10.0


def write_masks(found: VideoSegmentation, folder: Path, names: Sequence[str] | None = None) -> None:
    """A mask a frame, 0 or 255: the form in which MeViS and Ref-YouTube-VOS take submissions.

    Args:
        found: F frames.
        folder: Made where it does not exist.
        names: F names without a suffix. Defaults to ``00000`` on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f'{frame:05d}' for frame in range(len(found))] if names is None else names
    for frame, name in zip(range(len(found)), names, strict=True):
        Image.fromarray(found.mask(frame)).convert('L').save(folder / f'{name}.png')


def write_run_lengths(found: VideoSegmentation, path: Path) -> None:
    """``{"answer", "size", "frames": [[rle of each object]]}`` with COCO's run lengths as text."""
    frames = [
        [{**rle, 'counts': rle['counts'].decode('ascii')} for rle in frame] for frame in found.rles
    ]
    content = {'answer': found.answer, 'size': list(found.size), 'frames': frames}
    path.write_text(json.dumps(content) + '\n', encoding='utf-8')


def write_overlay(clip: Clip, found: VideoSegmentation, path: Path) -> None:
    """The clip with the masks drawn on it, as MP4.

    Args:
        clip: A file or a folder, which is read once more.
        found: In that clip.
        path: What is written.

    Raises:
        OSError: The video cannot be written.
    """
    height, width = found.size
    code = cv2.VideoWriter.fourcc(*'mp4v')
    rate = frames_per_second(clip) or FRAMES_PER_SECOND
    video = cv2.VideoWriter(str(path), code, rate, (width, height))
    try:
        if not video.isOpened():
            raise OSError(f'{path} cannot be written: OpenCV has no encoder for it, or no room')
        for number, frame in enumerate(read_frames(clip)):
            drawn = overlay(frame, found.mask(number), FOUND)
            video.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    finally:
        video.release()
