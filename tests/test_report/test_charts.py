from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from projects.llava_sam2_rl.report.charts import Curve, line_chart, number, thinned


def parse(svg):
    return ElementTree.fromstring(str(svg))


def test_points_lie_where_the_axes_say():
    root = parse(line_chart('Reward', [Curve('r', [(0, 0.0), (50, 0.5), (100, 1.0)])]))
    ticks = {text.text: (float(text.get('x')), float(text.get('y'))) for text in root.iter('text')}
    dots = [(float(dot.get('cx')), float(dot.get('cy'))) for dot in root.iter('circle')]
    assert dots[0][0] == pytest.approx(46)  # the left edge
    assert dots[2][0] == pytest.approx(ticks['100'][0], abs=0.1)
    assert dots[1][0] == pytest.approx((dots[0][0] + dots[2][0]) / 2, abs=0.1)
    # A label's baseline is 4 below its line.
    assert dots[2][1] == pytest.approx(ticks['1'][1] - 4, abs=0.1)
    assert dots[1][1] == pytest.approx((dots[0][1] + dots[2][1]) / 2, abs=0.1)
    assert dots[0][1] > dots[2][1]  # up is more


def test_values_that_are_not_finite_are_gaps():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 1.0), (6, 2.0)]
    root = parse(line_chart('x', [Curve('r', points)]))
    (path,) = root.iter('path')
    assert re.findall('[ML]', path.get('d')) == ['M', 'L', 'M', 'L']


@pytest.mark.parametrize('points', [[(7, 0.0)], [(7, 3.0), (8, 3.0)], [(7, -1e-9)], [(7, 1e12)]])
def test_a_single_value_and_a_flat_line(points):
    root = parse(line_chart('x', [Curve('r', points)]))
    dots = [(float(dot.get('cx')), float(dot.get('cy'))) for dot in root.iter('circle')]
    assert all(46 <= x <= 350 and 10 <= y <= 176 for x, y in dots)


def test_names_are_escaped_and_spoken():
    svg = line_chart('Reward', [Curve('a<b>&"', [(1, 0.25), (9, 0.5)])])
    assert '<b>' not in svg
    assert parse(svg).get('aria-label') == 'Reward: a<b>&" from 0.25 at step 1 to 0.5 at step 9'


def test_long_curves_are_means_of_neighbours():
    thin = thinned([(step, float(step)) for step in range(1, 301)], count=100)
    assert thin[:2] == [(3, 2.0), (6, 5.0)]
    assert (len(thin), thin[-1]) == (100, (300, 299.0))


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        *((0, '0'), (0.5, '0.5'), (0.12345, '0.123'), (12.345, '12.3'), (1234.5, '1234')),
        *(
            (0.00045, '4.5e-4'),
            (-0.25, '-0.25'),
            (1e6, '1.0e+6'),
            (math.nan, 'nan'),
            (100.0, '100'),
        ),
    ],
)
def test_numbers(value, text):
    assert number(value) == text
