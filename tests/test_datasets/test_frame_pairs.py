from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets.frame_pairs import check_gap, draw_pair, draw_shown_pair


@pytest.mark.parametrize('gap', [(1, 1), (1, None), (4, 8), (3, 100), (5, 5), (7, None)])
def test_every_pair_within_the_gap_is_equally_likely(gap):
    frames = [0, 4, 5, 8, 12, 13]
    most = gap[1] or 10**9
    wanted = {(a, b) for a, b in combinations(frames, 2) if gap[0] <= b - a <= most}
    rng = np.random.default_rng(0)
    counts = Counter(draw_pair(frames, gap, rng) for _ in range(300 * len(wanted)))
    assert set(counts) == wanted
    assert min(counts.values()) > 220
    assert max(counts.values()) < 380  # 300 expected, sigma 17


@pytest.mark.parametrize(('frames', 'gap'), [([], (1, None)), ([3], (1, None)), ([0, 4], (5, 9))])
def test_no_pair_is_none(frames, gap):
    assert draw_pair(frames, gap, np.random.default_rng(0)) is None


@pytest.mark.parametrize('gap', [(0, 4), (5, 4), (None, 4)])
def test_a_gap_that_is_no_range_is_refused(gap):
    with pytest.raises(ValueError, match=r'sav: pair_gap .* got'):
        check_gap(gap, 'sav')


def masks_of(shown):
    return lambda frame: np.full((2, 2), frame in shown)


def test_only_frames_that_show_the_object_are_drawn():
    rng = np.random.default_rng(0)
    drawn = [
        tuple(draw_shown_pair(range(30), (2, 4), masks_of({3, 5, 20, 24}), rng)) for _ in range(200)
    ]
    assert set(drawn) == {(3, 5), (20, 24)}
    assert 60 < drawn.count((3, 5)) < 140
    pair = draw_shown_pair(range(9), (1, None), masks_of({2, 7}), rng)
    assert list(pair) == [2, 7]
    assert all(mask.all() for mask in pair.values())


def test_without_a_pair_one_frame_is_drawn_or_none():
    rng = np.random.default_rng(0)
    drawn = {tuple(draw_shown_pair(range(9), (3, 4), masks_of({2, 8}), rng)) for _ in range(50)}
    assert drawn == {(2,), (8,)}
    assert draw_shown_pair(range(9), (1, None), masks_of(()), rng) == {}
    assert draw_shown_pair([], (1, None), masks_of(()), rng) == {}
