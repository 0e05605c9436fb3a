from __future__ import annotations

import math
import re
import sys
from xml.etree import ElementTree

import pytest

from projects.llava_sam2_rl.report.charts import Curve, line_chart, number, thinned


def parse(svg):
    """Elements by their plain names."""
    return ElementTree.fromstring(re.sub(r' xmlns(:\w+)?="[^"]*"|xlink:', '', svg))


def dots(root):
    return [(float(dot.get('x')), float(dot.get('y'))) for dot in root.iter('use')]


def test_points_lie_where_the_axes_say():
    root = parse(line_chart('Reward', [Curve('r', [(0, 0.0), (50, 0.5), (100, 1.0)])]))
    ticks = {text.text: (float(text.get('x')), float(text.get('y'))) for text in root.iter('text')}
    first, second, third = dots(root)
    assert first[0] == pytest.approx(ticks['0'][0])
    assert third[0] == pytest.approx(ticks['100'][0])
    assert second[0] == pytest.approx((first[0] + third[0]) / 2)
    # A label's baseline is a little below its line.
    drop = ticks['0.00'][1] - first[1]
    assert 2 < drop < 6
    assert third[1] == pytest.approx(ticks['1.00'][1] - drop)
    assert second[1] == pytest.approx((first[1] + third[1]) / 2)
    assert first[1] > third[1]  # up is more


def test_values_that_are_not_finite_are_gaps():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 1.0), (6, 2.0)]
    root = parse(line_chart('x', [Curve('r', points)]))
    (path,) = root.findall('.//g[@class="line c0"]/path')
    assert re.findall('[ML]', path.get('d')) == ['M', 'L', 'M', 'L']
    assert [dot.find('title').text for dot in root.iter('use')] == [
        *('r, step 1: 1', 'r, step 2: 2', 'r, step 5: 1', 'r, step 6: 2')
    ]


@pytest.mark.parametrize('points', [[(7, 0.0)], [(7, 3.0), (8, 3.0)], [(7, -1e-9)], [(7, 1e12)]])
def test_a_single_value_and_a_flat_line(points):
    root = parse(line_chart('x', [Curve('r', points)]))
    _, _, width, height = map(float, root.get('viewBox').split())
    assert all(20 <= x <= width and 5 <= y <= height - 20 for x, y in dots(root))
    texts = {text.text for text in root.iter('text')}
    assert {str(step) for step, _ in points} < texts
    assert '6.8' not in texts  # no part of a step


def test_names_are_escaped_and_spoken():
    svg = line_chart('Reward', [Curve('a<b>&"', [(1, 0.25), (9, 0.5)])])
    assert '<b>' not in svg
    assert parse(svg).get('aria-label') == 'Reward: a<b>&" from 0.25 at step 1 to 0.5 at step 9'


def test_the_page_gives_the_colours():
    """So that they follow its dark mode: no colour, no style rule of matplotlib's is left."""
    short, long = [(1, 0.5), (2, 1.0)], [(step, 0.1) for step in range(1, 31)]
    svg = line_chart('x', [Curve('a', short), Curve('b', long)])
    assert not re.search(r'#[0-9a-f]{6}\b|<style', svg)
    classes = [group.get('class') for group in parse(svg).iter('g') if group.get('class')]
    assert {'line c0', 'dot c0', 'line c1', 'dot c1 many', 'grid'} == set(classes)


def test_the_same_data_make_the_same_chart_and_two_charts_share_no_identifier():
    curves = [Curve('a', [(1, 0.5), (2, 1.0)]), Curve('b', [(1, 0.1)])]
    one, other = line_chart('one', curves), line_chart('other', curves)
    assert one == line_chart('one', curves)
    identifiers = [re.findall(r'\bid="(.*?)"', svg) for svg in (one, other)]
    assert len({*identifiers[0], *identifiers[1]}) == 4  # a kind of dot per curve


def test_no_global_figures(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)  # importing it raises
    line_chart('x', [Curve('a', [(1, 0.5)])])


def test_long_curves_are_means_of_neighbours():
    thin = thinned([(step, float(step)) for step in range(1, 301)], count=100)
    assert thin[:2] == [(3, 2.0), (6, 5.0)]
    assert (len(thin), thin[-1]) == (100, (300, 299.0))
    gaps = thinned([(1, math.nan), (2, math.inf), (3, 1.0), (4, math.nan)], count=2)
    assert math.isnan(gaps[0][1])
    assert gaps[1] == (4, 1.0)


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        *((0, '0'), (0.5, '0.5'), (0.12345, '0.1235'), (12.344, '12.34'), (1234.5, '1234')),
        *((0.00045, '0.00045'), (-0.25, '-0.25'), (1e6, '1e+06'), (math.nan, 'nan')),
    ],
)
def test_numbers(value, text):
    assert number(value) == text
