"""Single frames of a video, by their number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from projects.llava_sam2_rl.datasets.base import BadRecord

#: Kinds of boxes that an MP4 file begins with.
_FIRST_BOXES = (b'ftyp', b'moov', b'mdat', b'free', b'skip', b'wide')


def read_video_frames(
    path: Path, numbers: Sequence[int], fps: float, record: str
) -> list[np.ndarray]:
    """Frames of an MP4 as (H, W, 3) uint8 RGB.

    Number n is the frame that comes n-th, from 0, when the video is decoded from its start; the
    frames before it are decoded only as far as needed. A jump is trusted where the video has
    ``fps`` frames a second throughout, as far as it tells, and the decoder says that what it gives
    has the time of frame n; otherwise the video is decoded from its start.

    A decoder conceals damage inside the stream and gives a smeared picture, which this cannot see.

    Args:
        path: The video.
        numbers: Ascending frame numbers.
        fps: Frames a second that it should have.
        record: Name for messages.

    Raises:
        BadRecord: ``missing_video``, ``corrupt_video``, ``missing_frame`` (the video is shorter)
            or ``image_too_large``.
    """
    try:
        with open(path, 'rb') as file:
            start = file.read(8)
    except FileNotFoundError as error:
        raise BadRecord('missing_video', record, str(path)) from error
    except OSError as error:
        raise BadRecord('corrupt_video', record, f'{path}: {error}') from error
    # A play list under this name would make the decoder open whatever files that names.
    if start[4:] not in _FIRST_BOXES:
        raise BadRecord('corrupt_video', record, f'{path} is no MP4, it begins with {start!r}')
    # One thread: the data workers are what runs side by side.
    options = [cv2.CAP_PROP_N_THREADS, 1]
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, options)
    try:
        if not video.isOpened():
            raise BadRecord('corrupt_video', record, f'{path} cannot be opened')
        width = int(video.get(cv2.CAP_PROP_FRAME_WIDTH))
        height = int(video.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > (Image.MAX_IMAGE_PIXELS or np.inf):
            raise BadRecord('image_too_large', record, f'{path}: {height} x {width}')
        frames = _jump(video, numbers, fps) or _from_the_start(path, numbers, options, record)
    except cv2.error as error:
        raise BadRecord('corrupt_video', record, f'{path}: {error}') from error
    finally:
        video.release()
    return [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in frames]


def _jump(video: cv2.VideoCapture, numbers: Sequence[int], fps: float) -> list[np.ndarray] | None:
    """The frames, each jumped to, or ``None`` where that is not certain to be exact."""
    # 24 frames a second are often 24 000 / 1001. An average that is off means varying steps.
    own_fps = video.get(cv2.CAP_PROP_FPS)
    if min(abs(own_fps - fps), abs(own_fps - fps * 1000 / 1001)) > 1e-3:
        return None
    frames = []
    for number in numbers:
        if not video.set(cv2.CAP_PROP_POS_FRAMES, number):
            return None
        ok, frame = video.read()
        # The time stamp that the decoded frame carries, not a count of the decoder's calls.
        seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if not ok or abs(seconds * own_fps - number) > 0.25:
            return None
        frames.append(frame)
    return frames


def _from_the_start(
    path: Path, numbers: Sequence[int], options: list[int], record: str
) -> list[np.ndarray]:
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, options)
    try:
        frames, at = [], 0
        for number in numbers:
            while at <= number:
                if not video.grab():
                    raise BadRecord(
                        'missing_frame',
                        record,
                        f'frame {number} of {path}, which decodes up to frame {at - 1}',
                    )
                at += 1
            ok, frame = video.retrieve()
            if not ok:
                raise BadRecord('corrupt_video', record, f'frame {number} of {path}')
            frames.append(frame)
        return frames
    finally:
        video.release()
