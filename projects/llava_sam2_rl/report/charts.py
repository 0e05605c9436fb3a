"""Line charts as SVG that follows the page: its colours, its dark mode, its print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

#: A curve has so many points at most; of more, neighbours are averaged.
MAX_POINTS = 150
WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24


@dataclass(frozen=True)
class Curve:
    """A named line.

    Args:
        name: In the legend.
        points: ``(step, value)`` by step; values that are not finite are gaps.
    """

    name: str
    points: Sequence[tuple[int, float]]

    @property
    def finite(self) -> list[tuple[int, float]]:
        """Points that can be drawn."""
        return [(step, value) for step, value in self.points if math.isfinite(value)]


def line_chart(title: str, curves: Sequence[Curve]) -> Markup:
    """One ``<svg>``. Curve number n has the class ``cN``, from which the page colours it.

    Args:
        title: What the values are; part of the text that screen readers read.
        curves: At least one finite value among them.
    """
    curves = [Curve(curve.name, thinned(curve.points)) for curve in curves]
    finite = [point for curve in curves for point in curve.finite]
    steps = [step for step, _ in finite]
    values = [value for _, value in finite]
    x_ticks = _ticks(min(steps), max(steps), 5, integer=True)
    y_ticks = _ticks(min(values), max(values), 5)
    x_range = (min(steps), max(max(steps), min(steps) + 1))
    y_range = (min(y_ticks[0], min(values)), max(y_ticks[-1], max(values)))

    def x(step: float) -> float:
        return _LEFT + (step - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (value - y_range[0]) / (y_range[1] - y_range[0])
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    root = ElementTree.Element(
        'svg',
        {
            'viewBox': f'0 0 {WIDTH} {HEIGHT}',
            'role': 'img',
            'class': 'chart',
            'aria-label': _spoken(title, curves),
        },
    )
    for tick in y_ticks:
        _add(root, 'line', x1=_LEFT, x2=WIDTH - _RIGHT, y1=y(tick), y2=y(tick), **{'class': 'grid'})
        label = _add(root, 'text', x=_LEFT - 6, y=y(tick) + 4, **{'text-anchor': 'end'})
        label.text = number(tick)
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            anchor = 'end' if x(tick) > WIDTH - 24 else 'middle'
            label = _add(root, 'text', x=x(tick), y=HEIGHT - 7, **{'text-anchor': anchor})
            label.text = f'{tick:g}'
    for index, curve in enumerate(curves):
        path = ''
        pen_down = False
        for step, value in curve.points:
            if not math.isfinite(value):
                pen_down = False
                continue
            path += f'{"L" if pen_down else "M"}{x(step):.1f} {y(value):.1f}'
            pen_down = True
        _add(root, 'path', d=path, **{'class': f'line c{index}'})
        for step, value in curve.finite:
            # Dots carry the numbers; they are seen where a line would hide that there are few.
            dot = _add(root, 'circle', cx=x(step), cy=y(value), r=3, **{'class': f'dot c{index}'})
            if len(curve.finite) > 20:
                dot.set('class', f'dot c{index} many')
            ElementTree.SubElement(
                dot, 'title'
            ).text = f'{curve.name}, step {step}: {number(value)}'
    # ElementTree has escaped what came from the log.
    return Markup(ElementTree.tostring(root, encoding='unicode'))


def thinned(
    points: Sequence[tuple[int, float]], count: int = MAX_POINTS
) -> list[tuple[int, float]]:
    """At most ``count`` points: means of equally many neighbours, at the last one's step."""
    if len(points) <= count:
        return list(points)
    groups = np.array_split(np.arange(len(points)), count)
    thin = []
    for group in groups:
        finite = [points[i][1] for i in group if math.isfinite(points[i][1])]
        thin.append((points[group[-1]][0], float(np.mean(finite)) if finite else math.nan))
    return thin


def number(value: float) -> str:
    """Three significant digits, without an exponent where it can be."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        text = f'{value:.{digits}f}'
        return text.rstrip('0').rstrip('.') if '.' in text else text
    return f'{value:.1e}'.replace('e-0', 'e-').replace('e+0', 'e+')


def _ticks(low: float, high: float, count: int, integer: bool = False) -> list[float]:
    if low == high:
        margin = abs(low) * 0.1 or 0.1
        low, high = (low, low + 1) if integer else (low - margin, high + margin)
    locator = MaxNLocator(count, integer=integer, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3)
    return [float(tick) for tick in locator.tick_values(low, high)]


def _spoken(title: str, curves: Sequence[Curve]) -> str:
    parts = [
        f'{curve.name} from {number(found[0][1])} at step {found[0][0]} to '
        f'{number(found[-1][1])} at step {found[-1][0]}'
        for curve in curves
        if (found := curve.finite)
    ]
    return f'{title}: {"; ".join(parts)}'


def _add(parent: ElementTree.Element, tag: str, **attributes: object) -> ElementTree.Element:
    values = {
        key: f'{value:.1f}' if isinstance(value, float) else str(value)
        for key, value in attributes.items()
    }
    return ElementTree.SubElement(parent, tag, values)
