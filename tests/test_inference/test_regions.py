"""Boxes, points and scribbles as SAM 2 is given them."""

from __future__ import annotations

import numpy as np
import pytest

from projects.llava_sam2_rl.inference import Box, Points, Scribble
from projects.llava_sam2_rl.inference.regions import prompt_points


def test_a_box_is_its_corners():
    points, labels = prompt_points(Box(1, 2, 30, 40), 30, 40)
    assert points.tolist() == [[1, 2], [30, 40]]
    assert labels.tolist() == [2, 3]  # SAM 2: the corners of a box


def test_points_are_on_the_object_unless_said():
    assert prompt_points(Points(((1, 2), (3, 4))), 9, 9)[1].tolist() == [1, 1]
    points, labels = prompt_points(Points(((1, 2), (3, 4)), (1, 0)), 9, 9)
    assert points.tolist() == [[1, 2], [3, 4]]
    assert labels.tolist() == [1, 0]


def test_a_scribble_is_points_at_equal_distances():
    """An L of 6 + 2: four points, a quarter of 8 apart, 1 from either end."""
    points, labels = prompt_points(Scribble(((0, 5), (6, 5), (6, 7)), num_points=4), 9, 9)
    assert points.tolist() == [[1, 5], [3, 5], [5, 5], [6, 6]]
    assert labels.tolist() == [1, 1, 1, 1]
    assert len(prompt_points(Scribble(((0, 0), (8, 8))), 9, 9)[0]) == 8


def test_a_scribble_that_never_moves_is_a_point():
    points, labels = prompt_points(Scribble(((4, 5), (4, 5), (4, 5))), 9, 9)
    assert points.tolist() == [[4, 5]]
    assert labels.tolist() == [1]


@pytest.mark.parametrize(
    ('region', 'message'),
    [
        (Box(5, 1, 5, 4), r'has no inside: give left, top, right, bottom'),
        (Box(5, 4, 6, 1), r'has no inside'),
        (Box(0, 0, 9.5, 4), r'right=9\.5.* reaches beyond the photograph, which is 9 x 8 pixels'),
        (Box(-1, 0, 4, 4), r'reaches beyond'),
        (Points(((1, float('nan')),)), r'reaches beyond'),
        (Points(()), r'one or more pairs of x and y'),
        (Points(((1, 2, 3),)), r'one or more pairs of x and y'),
        (Points(((1, 2),), (0,)), r'at least one point must be on it'),
        (Points(((1, 2),), (1, 1)), r'every point needs a label'),
        (Points(((1, 2),), (2,)), r'1 on the object or 0 beside it'),
        (Scribble(()), r'one or more pairs of x and y'),
        (Scribble(((1, 2),), num_points=0), r'num_points must be at least 1'),
    ],
)
def test_what_is_no_region(region, message):
    with pytest.raises(ValueError, match=message):
        prompt_points(region, 9, 8)


def test_the_far_border_belongs_to_the_photograph():
    assert np.array_equal(prompt_points(Points(((9, 8),)), 9, 8)[0], [[9, 8]])
