"""Line charts: drawn by matplotlib, coloured by the page they lie in."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

#: A curve has so many points at most; of more, neighbours are averaged.
MAX_POINTS = 150
#: Of so many points, each has a dot; the dots of more are seen under the pointer.
_MAX_DOTS = 20
_TICKS = [1, 2, 2.5, 5, 10]
_SVG, _XLINK = 'http://www.w3.org/2000/svg', 'http://www.w3.org/1999/xlink'
ElementTree.register_namespace('', _SVG)
ElementTree.register_namespace('xlink', _XLINK)


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
    """One ``<svg>``, the same for the same data.

    It has no colours of its own, so that it follows the page's dark mode and print: the page's
    style sheet has classes for them. ``line cN`` and ``dot cN`` are curve number N and its points,
    ``dot cN many`` those of a long curve, ``grid`` the lines behind them.

    Args:
        title: What the values are; part of the text that screen readers read. No other chart of
            the page has it.
        curves: At least one finite value among them.
    """
    # Slow to import, and most processes of a run draw nothing.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = [Curve(curve.name, thinned(curve.points)) for curve in curves]
    # `none`: text stays text. The salt makes identifiers, which two charts must not share.
    with rc_context(
        {
            'svg.fonttype': 'none',
            'svg.hashsalt': title,
            'font.sans-serif': ['DejaVu Sans'],
            'font.size': 11,
        }
    ):
        figure = Figure(figsize=(5, 2.8), layout='constrained')
        axes = figure.add_subplot(frame_on=False)
        for index, curve in enumerate(curves):
            many = ' many' if len(curve.finite) > _MAX_DOTS else ''
            steps, values = np.array(curve.points, dtype=float).T
            values[~np.isfinite(values)] = np.nan
            axes.plot(steps, values, gid=f'line c{index}', clip_on=False)
            axes.plot(steps, values, 'o', gid=f'dot c{index}{many}', clip_on=False)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_TICKS, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICKS))
        axes.tick_params(length=0)
        axes.grid(axis='y', gid='grid', clip_on=False)
        file = io.StringIO()
        nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
        figure.savefig(file, format='svg', transparent=True, metadata=nothing)
    return _for_the_page(file.getvalue(), title, curves)


def _for_the_page(svg: str, title: str, curves: Sequence[Curve]) -> Markup:
    """Classes instead of colours, a tooltip at every point, and a text for screen readers."""
    root = ElementTree.fromstring(svg)
    root.attrib = {
        'viewBox': root.attrib['viewBox'],
        'role': 'img',
        'class': 'chart',
        'aria-label': _spoken(title, curves),
    }
    for defs in root.findall(f'{{{_SVG}}}defs'):  # style rules for every element of the page
        root.remove(defs)
    for group in root.iter(f'{{{_SVG}}}g'):
        name = group.attrib.pop('id', '')
        kind, _, rest = name.partition(' ')
        if kind not in ('line', 'dot', 'grid'):
            continue
        group.set('class', name)
        for element in group.iter():
            element.attrib.pop('style', None)
        if kind == 'dot':
            curve = curves[int(rest.split()[0][1:])]
            dots = group.iter(f'{{{_SVG}}}use')
            for dot, (step, value) in zip(dots, curve.finite, strict=True):
                text = f'{curve.name}, step {step}: {number(value)}'
                ElementTree.SubElement(dot, f'{{{_SVG}}}title').text = text
    # ElementTree has escaped what came from the log.
    return Markup(ElementTree.tostring(root, encoding='unicode'))


def thinned(
    points: Sequence[tuple[int, float]], count: int = MAX_POINTS
) -> list[tuple[int, float]]:
    """At most ``count`` points: means of equally many neighbours, at the last one's step."""
    if len(points) <= count:
        return list(points)
    thin = []
    for group in np.array_split(np.array(points, dtype=float), count):
        finite = group[np.isfinite(group[:, 1]), 1]
        thin.append((int(group[-1, 0]), float(finite.mean()) if len(finite) else math.nan))
    return thin


def number(value: float) -> str:
    """At most four significant digits."""
    return f'{value:.4g}'


def _spoken(title: str, curves: Sequence[Curve]) -> str:
    parts = [
        f'{curve.name} from {number(found[0][1])} at step {found[0][0]} to '
        f'{number(found[-1][1])} at step {found[-1][0]}'
        for curve in curves
        if (found := curve.finite)
    ]
    return f'{title}: {"; ".join(parts)}'
