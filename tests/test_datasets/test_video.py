import shutil

import cv2
import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import BadRecord, video
from projects.llava_sam2_rl.datasets.video import read_video_frames

FPS, COUNT, HEIGHT, WIDTH = 24, 60, 48, 64


def write_video(path, count=COUNT, fps=FPS, height=HEIGHT, width=WIDTH):
    """A red disc on blue whose column is the frame's number."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), fps, (width, height))
    for number in range(count):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[..., 0] = 120
        cv2.circle(frame, (number % width, height // 2), 9, (0, 0, 240), -1)
        writer.write(frame)
    writer.release()
    return path


def decoded(path):
    """All frames, one after the other from the start, RGB."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        ok, frame = capture.read()
        if not ok:
            return frames
        frames.append(frame[..., ::-1])


@pytest.fixture(scope='module')
def movie(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp('video') / 'movie.mp4')


def test_a_jump_gives_exactly_the_frames_of_sequential_decoding(movie, monkeypatch):
    frames = decoded(movie)
    assert len(frames) == COUNT
    assert len({frame.tobytes() for frame in frames}) == COUNT
    monkeypatch.setattr(video, '_from_the_start', None)
    for pair in [(0, 1), (0, 59), (7, 8), (11, 12), (12, 13), (30, 47), (58, 59)]:
        for number, frame in zip(pair, read_video_frames(movie, pair, FPS, 'x')):
            assert np.array_equal(frame, frames[number]), number
    red, _, blue = read_video_frames(movie, [24], FPS, 'x')[0][HEIGHT // 2, 24].tolist()
    assert red > 180 > 80 > blue


def test_without_a_trusted_jump_the_video_is_decoded_from_its_start(movie, monkeypatch, tmp_path):
    frames = decoded(movie)
    # Stamps that are not the frame's number times the step: do not jump.
    slow = write_video(tmp_path / 'slow.mp4', fps=15)
    called = []
    original = video._from_the_start
    monkeypatch.setattr(
        video, '_from_the_start', lambda *args: called.append(args) or original(*args)
    )
    for path, expected in ((slow, decoded(slow)), (movie, frames)):
        if path == movie:
            # A decoder that lands one frame away, as after a gap in the time stamps.
            monkeypatch.setattr(video, '_jump', lambda *args: None)
        found = read_video_frames(path, [5, 6, 40], FPS, 'x')
        for number, frame in zip((5, 6, 40), found):
            assert np.array_equal(frame, expected[number])
    assert len(called) == 2


class LandsBeside:
    """A capture whose jumps end one frame further."""

    def __init__(self, capture):
        self.capture = capture

    def set(self, key, value):
        return self.capture.set(key, value + 1)

    def __getattr__(self, name):
        return getattr(self.capture, name)


def test_a_jump_that_lands_beside_is_noticed_by_the_time_stamp(movie):
    capture = cv2.VideoCapture(str(movie))
    assert len(video._jump(capture, [10, 20], FPS)) == 2
    assert video._jump(LandsBeside(capture), [10, 20], FPS) is None


def reason(path, numbers=(0,)):
    with pytest.raises(BadRecord) as caught:
        read_video_frames(path, numbers, FPS, 'sav/1')
    assert caught.value.name == 'sav/1'
    return caught.value.reason


def test_a_frame_behind_the_end_is_a_bad_record(movie):
    assert reason(movie, (3, COUNT)) == 'missing_frame'


@pytest.mark.parametrize(
    'content',
    [b'', b'\0' * 4000, b'nonsense' * 100, b'#EXTM3U\n#EXTINF:1,\nother.ts\n', b'ffconcat'],
)
def test_what_is_no_video_is_a_bad_record(tmp_path, content, capfd):
    (tmp_path / 'bad.mp4').write_bytes(content)
    assert reason(tmp_path / 'bad.mp4') == 'corrupt_video'
    assert reason(tmp_path / 'none.mp4') == 'missing_video'
    assert reason(tmp_path) == 'corrupt_video'


def test_a_play_list_that_names_another_file_is_not_followed(movie):
    play_list = movie.with_name('list.mp4')
    play_list.write_text(f'ffconcat version 1.0\nfile {movie.name}\n')
    assert cv2.VideoCapture(str(play_list)).read()[0]  # The decoder would.
    assert reason(play_list) == 'corrupt_video'


def test_a_truncated_video_is_a_bad_record(movie, tmp_path, capfd):
    cut = tmp_path / 'cut.mp4'
    shutil.copy(movie, cut)
    with cut.open('r+b') as file:
        file.truncate(cut.stat().st_size // 2)
    assert reason(cut) == 'corrupt_video'


def test_a_huge_frame_is_refused_before_it_is_decoded(movie, monkeypatch):
    monkeypatch.setattr(video.Image, 'MAX_IMAGE_PIXELS', HEIGHT * WIDTH - 1)
    monkeypatch.setattr(video, '_jump', None)
    assert reason(movie) == 'image_too_large'
