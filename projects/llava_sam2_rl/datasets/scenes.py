"""Generated scenes of coloured shapes: the data of the tiny configs, drawn on the fly.

Every scene is built so that no single attribute tells its objects apart: among N objects each of
size, colour, shape and position takes fewer than N values, and one pair of *twins* differs in one
attribute only. Still every full caption fits exactly one object of its scene.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np

from projects.llava_sam2_rl.datasets.generated import GeneratedDataset, Scene, draw_kept
from projects.llava_sam2_rl.registry import DATASETS

#: Area of an object as a share of the image.
SIZES = {'small': 0.025, 'large': 0.07}
#: RGB.
COLOURS = {
    'red': (215, 40, 40),
    'orange': (245, 140, 25),
    'yellow': (240, 225, 50),
    'green': (40, 165, 60),
    'blue': (45, 80, 220),
    'purple': (150, 55, 185),
    'white': (245, 245, 245),
}
SHAPES = ('circle', 'square', 'triangle', 'cross')
#: Row-major cells of a 3x3 grid.
POSITIONS = (
    'top left',
    'top center',
    'top right',
    'center left',
    'center',
    'center right',
    'bottom left',
    'bottom center',
    'bottom right',
)
#: What the attributes of an object may be; captions name them by these words.
VALUES: dict[str, tuple[str, ...]] = {
    'size': tuple(SIZES),
    'colour': tuple(COLOURS),
    'shape': SHAPES,
    'position': POSITIONS,
}

#: A scene belongs to the split that the hash of its objects falls to, so that no combination of
#: objects is ever seen in two splits.
_SPLIT_BUCKETS = {'train': (0, 1), 'val': (2,), 'test': (3,)}
_NUM_BUCKETS = 4

#: Centres keep this share of the side away from the borders of their grid cell.
_CELL_MARGIN = 0.04
#: Share of an object that another one may hide.
_MAX_HIDDEN = 0.1
_SUBPIXEL_BITS = 4


def reference_caption(attributes: dict[str, str]) -> str:
    """``a small red circle in the top left``."""
    return 'a {size} {colour} {shape} in the {position}'.format(**attributes)


def vague_caption(
    attributes: dict[str, str],
    rng: np.random.Generator,
    keep_probability: float | Mapping[str, float] = 0.5,
) -> str:
    """A reference caption that drops what it likes, but for the shape.

    Args:
        attributes: Of one object.
        rng: Draws which of size, colour and position stay.
        keep_probability: See :func:`~.generated.draw_kept`. Defaults to 0.5.
    """
    kept = draw_kept(('size', 'colour', 'position'), rng, keep_probability)
    words = [*(attributes[key] for key in kept if key != 'position'), attributes['shape']]
    article = 'an' if words[0][0] in 'aeiou' else 'a'
    place = f' in the {attributes["position"]}' if 'position' in kept else ''
    return f'{article} {" ".join(words)}{place}'


# -- shapes --------------------------------------------------------------------------------------


def _unit_area_outline(shape: str) -> np.ndarray:
    """(K, 2) corners of a shape of area 1 whose centroid is the origin; x right, y down."""

    def ring(radii: Sequence[float], start: float) -> np.ndarray:
        angles = start + np.arange(len(radii)) * 2 * np.pi / len(radii)
        return np.stack([np.cos(angles), np.sin(angles)], 1) * np.asarray(radii)[:, None]

    if shape == 'circle':
        points = ring([1.0] * 48, 0.0)
    elif shape == 'square':
        points = ring([1.0] * 4, np.pi / 4)
    elif shape == 'triangle':
        points = ring([1.0] * 3, -np.pi / 2)
    elif shape == 'cross':
        arm = [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]
        points = np.array([*arm, *((-x, -y) for x, y in arm)], dtype=np.float64)
    else:
        raise ValueError(f'unknown shape {shape!r}')
    x, y = points.T
    area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return points / math.sqrt(area)


_OUTLINES = {shape: _unit_area_outline(shape) for shape in SHAPES}
#: Farthest corner from the centroid along either axis.
EXTENTS = {shape: float(np.abs(points).max()) for shape, points in _OUTLINES.items()}


# -- what a scene holds --------------------------------------------------------------------------


def _draw_object(rng: np.random.Generator) -> dict[str, str]:
    return {key: values[int(rng.random() * len(values))] for key, values in VALUES.items()}


def _appearance(attributes: dict[str, str]) -> tuple[str, str, str]:
    return attributes['size'], attributes['colour'], attributes['shape']


def _other(rng: np.random.Generator, key: str, value: str) -> str:
    others = [candidate for candidate in VALUES[key] if candidate != value]
    return others[int(rng.random() * len(others))]


def _draw_objects(
    rng: np.random.Generator, count: int, paired: bool
) -> list[dict[str, str]] | None:
    """Attributes of ``count`` objects; ``None`` where the draw breaks a rule."""
    first = _draw_object(rng)
    # With a second frame positions change, so twins have to differ in how they look.
    # Without one, most twins look the same and only their position tells them apart.
    keys = ('size', 'shape', 'colour') if paired else ('size', 'shape', *('position',) * 3)
    differs = keys[int(rng.random() * len(keys))]
    twin = {**first, differs: _other(rng, differs, first[differs])}
    objects = [first, twin]
    while len(objects) < count:
        new = _draw_object(rng)
        if len(objects) == 2:
            # The twins share all but one attribute; the third object repeats that one.
            new[differs] = objects[int(rng.random() * 2)][differs]
            if differs == 'colour':
                new['colour'] = first['colour']
        objects.append(new)

    by_cell: dict[str, list[str]] = {}
    for attributes in objects:
        by_cell.setdefault(attributes['position'], []).append(attributes['size'])
    # Two large objects do not fit into one cell.
    if any(len(sizes) > 2 or sizes == ['large', 'large'] for sizes in by_cell.values()):
        return None
    names = [_appearance(o) if paired else reference_caption(o) for o in objects]
    if len(set(names)) < count:
        return None
    return objects


def _bucket(objects: Sequence[dict[str, str]]) -> int:
    signature = '|'.join(sorted(reference_caption(attributes) for attributes in objects))
    return zlib.crc32(signature.encode()) % _NUM_BUCKETS


def _place(
    rng: np.random.Generator,
    objects: Sequence[dict[str, str]],
    around: list[tuple[float, float]] | None = None,
    max_shift: float = 0.0,
) -> list[tuple[float, float]] | None:
    """Centres (x, y) as shares of the side: in the objects' grid cells, or near ``around``.

    ``None`` where some object found no room.
    """
    radii = [math.sqrt(SIZES[o['size']] / math.pi) for o in objects]
    centres: list[tuple[float, float] | None] = [None] * len(objects)
    for i in sorted(range(len(objects)), key=lambda i: -radii[i]):
        side = math.sqrt(SIZES[objects[i]['size']])
        edge = EXTENTS[objects[i]['shape']] * side + 0.01
        ranges = []
        for axis in (0, 1):
            if around is None:
                row, column = divmod(POSITIONS.index(objects[i]['position']), 3)
                cell = (column, row)[axis]
                low, high = cell / 3 + _CELL_MARGIN, (cell + 1) / 3 - _CELL_MARGIN
            else:
                low, high = around[i][axis] - max_shift, around[i][axis] + max_shift
            ranges.append((max(low, edge), min(high, 1 - edge)))
        (x0, x1), (y0, y1) = ranges
        for u, v in rng.random((24, 2)).tolist():
            x, y = x0 + u * (x1 - x0), y0 + v * (y1 - y0)
            if all(
                centre is None or math.dist((x, y), centre) > 1.02 * (radii[i] + radius)
                for centre, radius in zip(centres, radii)
            ):
                centres[i] = (x, y)
                break
        else:
            return None
    return [centre for centre in centres if centre is not None]


#: Attributes of N objects, their centres, a background and N colours.
Start: TypeAlias = tuple[
    list[dict[str, str]], list[tuple[float, float]], np.ndarray, list[np.ndarray]
]


# -- drawing -------------------------------------------------------------------------------------


def _background(rng: np.random.Generator) -> np.ndarray:
    """(5, 5, 3) float32: a dull colour with slow shading, to be enlarged to the image."""
    base = rng.uniform(70, 165) + rng.uniform(-14, 14, 3)
    return (base + rng.uniform(-10, 10, (5, 5, 1))).astype(np.float32)


def render(
    rng: np.random.Generator,
    size: int,
    background: np.ndarray,
    objects: Sequence[dict[str, str]],
    colours: Sequence[np.ndarray],
    centres: Sequence[tuple[float, float]],
    max_hidden: float = _MAX_HIDDEN,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Image and visible masks; ``None`` where an object is hidden too far by a later one.

    Args:
        rng: Draws the noise of the pixels.
        size: Side S of the image.
        background: ``(5, 5, 3)`` float32.
        objects: N, those behind first.
        colours: N × ``(3,)``.
        centres: N places (x, y) as shares of the side; what lies outside is cut off.
        max_hidden: Share of an object that others may hide; 1 allows all.
    """
    image = cv2.resize(background, (size, size), interpolation=cv2.INTER_LINEAR)
    masks = np.zeros((len(objects), size, size), np.uint8)
    for mask, attributes, (x, y) in zip(masks, objects, centres):
        points = _OUTLINES[attributes['shape']] * math.sqrt(SIZES[attributes['size']])
        # Pixel centres lie at half-integer positions.
        points = (points + np.array([x, y])) * size - 0.5
        fixed = np.round(points * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        cv2.fillPoly(mask, [fixed], 1, lineType=cv2.LINE_8, shift=_SUBPIXEL_BITS)
    masks = masks.view(bool)
    hidden = np.zeros((size, size), bool)
    for i in reversed(range(len(objects))):
        full = np.count_nonzero(masks[i])
        np.logical_and(masks[i], ~hidden, out=masks[i])
        if np.count_nonzero(masks[i]) < (1 - max_hidden) * full:
            return None
        hidden |= masks[i]
        image[masks[i]] = colours[i]
    noise = rng.integers(-9, 10, image.shape, dtype=np.int8)
    return np.clip(image + noise, 0, 255).astype(np.uint8), masks


@DATASETS.register_module()
class GeneratedScenes(GeneratedDataset):
    """Coloured shapes on a lightly textured background, with exact masks and captions.

    A scene is a function of ``(seed, split, index)`` alone. Each item asks for one object of it.

    Args:
        length: Scenes in the set.
        image_size: Side in pixels.
        num_objects: Fewest and most objects of a scene, between 3 and 6.
        paired: Adds a second frame in which every object has moved; no two objects of such a
            scene look the same, and captions describe the first frame.
        max_shift: Farthest move along either axis, as a share of the side.
        split: ``'train'``, ``'val'`` or ``'test'``; no combination of objects occurs in two splits.
        **kwargs: See :class:`RegionDataset`.
    """

    least_objects = 3
    least_size = 48
    kind = 'shape'

    def __init__(
        self,
        length: int,
        image_size: int = 128,
        num_objects: tuple[int, int] = (3, 5),
        paired: bool = False,
        max_shift: float = 0.15,
        split: str = 'train',
        source: str = 'scenes',
        **kwargs: Any,
    ) -> None:
        super().__init__(
            length, image_size, num_objects, paired, max_shift, split, source=source, **kwargs
        )

    def draw(self, rng: np.random.Generator, count: int) -> Scene | None:
        """A scene of ``count`` objects; ``None`` where the draw breaks a rule."""
        start = self.draw_start(rng, count)
        if start is None:
            return None
        objects, centres, background, colours = start
        frame = render(rng, self.image_size, background, objects, colours, centres)
        if frame is None:
            return None
        frame2: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
        if self.paired:
            near = _place(rng, objects, around=centres, max_shift=self.max_shift)
            if near is None:
                return None
            moved = render(rng, self.image_size, background, objects, colours, near)
            if moved is None:
                return None
            frame2 = moved
        captions = [reference_caption(attributes) for attributes in objects]
        return Scene(*frame, captions, objects, *frame2)

    def draw_start(self, rng: np.random.Generator, count: int) -> Start | None:
        """What there is, where, and how it looks; ``None`` where the draw breaks a rule."""
        objects = _draw_objects(rng, count, self.paired)
        if objects is None or _bucket(objects) not in _SPLIT_BUCKETS[self.split]:
            return None
        centres = _place(rng, objects)
        if centres is None:
            return None
        background = _background(rng)
        colours = [np.array(COLOURS[o['colour']]) + rng.integers(-10, 11, 3) for o in objects]
        return objects, centres, background, colours
