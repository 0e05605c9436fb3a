"""Collages of real objects: cut out of photographs, pasted over others, exact masks and captions.

The photographs are those that scikit-image carries inside its own package; outlines and backgrounds
are this package's ``assets/photographs/cutouts.json``. In every picture one object comes twice, so
that its kind does not tell which is meant: size or side has to be said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from projects.llava_sam2_rl.datasets.generated import GeneratedDataset, Scene, draw_kept
from projects.llava_sam2_rl.datasets.photographs import picture_dir, require_pictures
from projects.llava_sam2_rl.datasets.records import path_inside, read_image
from projects.llava_sam2_rl.registry import DATASETS

CUTOUTS = Path(__file__).parents[1] / 'assets/photographs/cutouts.json'
#: Area of an object as a share of the picture.
SIZES = {'small': 0.035, 'large': 0.105}
#: Third of the picture that an object's centre lies in.
SIDES = ('left', 'middle', 'right')
OBJECTS = ('cat', 'cup', 'motorcycle', 'astronaut', 'shuttle', 'coin')
#: What the attributes of an object may be; captions name them by these words.
VALUES: dict[str, tuple[str, ...]] = {'size': tuple(SIZES), 'side': SIDES, 'object': OBJECTS}

#: Size, side and object.
Combination = tuple[str, str, str]

#: Share of an object that stays to be seen behind others.
MIN_VISIBLE = 0.6
#: Centres keep this share of the width away from the borders of their third.
_THIRD_MARGIN = 0.05


@dataclass(frozen=True, eq=False)
class Cutout:
    """An object of a photograph.

    Args:
        pixels: ``(h, w, 3)`` float32, 0–255, 0 outside of the object.
        alpha: ``(h, w)`` float32, 1 inside.
    """

    pixels: np.ndarray
    alpha: np.ndarray


@dataclass(frozen=True)
class Placed:
    """How an object is pasted.

    Args:
        combination: What it is, how large and where.
        x: Of its box's centre, as a share of the picture's side.
        y: The same, downwards.
        share: Its area, as a share of the picture's.
        flipped: Left is right.
        light: Factor of its brightness.
    """

    combination: Combination
    x: float
    y: float
    share: float
    flipped: bool
    light: float


def collage_caption(combination: Combination) -> str:
    """``the large left cat``."""
    return f'the {" ".join(combination)}'


def vague_collage_caption(
    attributes: Mapping[str, str],
    rng: np.random.Generator,
    keep_probability: float | Mapping[str, float] = 0.5,
) -> str:
    """A reference caption that drops what it likes, but for the object.

    Args:
        attributes: Of one object.
        rng: Draws which of size and side stay.
        keep_probability: See :func:`~.generated.draw_kept`. Defaults to 0.5.
    """
    kept = draw_kept(('size', 'side'), rng, keep_probability)
    return ' '.join(['the', *(attributes[key] for key in kept), attributes['object']])


def held_out(split: str) -> list[Combination]:
    """What only ``'val'`` or only ``'test'`` shows: a size and a side of each object.

    Of each object training shows both sizes and all sides, but not these two together.
    """
    shift = {'val': 0, 'test': 1}[split]
    return [(tuple(SIZES)[k % 2], SIDES[(k + shift) % 3], name) for k, name in enumerate(OBJECTS)]


def combinations(split: str) -> list[Combination]:
    """What pictures of a split show; those of validation and test have things of training too."""
    hidden = {c for other in ('val', 'test') if other != split for c in held_out(other)}
    every = [(size, side, name) for name in OBJECTS for size in SIZES for side in SIDES]
    return [c for c in every if c not in hidden]


# -- drawing -------------------------------------------------------------------------------------


def cut_out(image: np.ndarray, outline: Sequence[int]) -> Cutout:
    """The part of a picture ``(H, W, 3)`` inside a polygon ``[x, y, …]``."""
    points = np.array(outline, np.int32).reshape(-1, 2)
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(mask, [points], 1)
    x, y, width, height = cv2.boundingRect(mask)
    alpha = mask[y : y + height, x : x + width].astype(np.float32)
    return Cutout(image[y : y + height, x : x + width] * alpha[..., None], alpha)


def compose(
    background: np.ndarray, cutouts: dict[str, Cutout], objects: Sequence[Placed]
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Pastes objects one over another.

    Args:
        background: ``(S, S, 3)`` uint8.
        cutouts: By the objects' names.
        objects: N, those behind first.

    Returns:
        The picture; masks ``(N, S, S)`` bool of what is to be seen; and N shares of each object
        that are, of all of its outline.
    """
    size = len(background)
    image = background.astype(np.float32)
    masks = np.zeros((len(objects), size, size), bool)
    whole = []
    for i, placed in enumerate(objects):
        cutout = cutouts[placed.combination[2]]
        scale = math.sqrt(placed.share * size * size / float(cutout.alpha.sum()))
        height, width = (max(2, round(side * scale)) for side in cutout.alpha.shape)
        # Shrunk with what is outside as 0, so that nothing of the old background bleeds in.
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        pixels = cv2.resize(cutout.pixels, (width, height), interpolation=method)
        alpha = cv2.resize(cutout.alpha, (width, height), interpolation=method)
        if placed.flipped:
            pixels, alpha = pixels[:, ::-1], alpha[:, ::-1]
        whole.append(int((alpha >= 0.5).sum()))
        top, left = round(placed.y * size - height / 2), round(placed.x * size - width / 2)
        rows = slice(max(top, 0), min(top + height, size))
        columns = slice(max(left, 0), min(left + width, size))
        inside = (
            slice(rows.start - top, rows.stop - top),
            slice(columns.start - left, columns.stop - left),
        )
        pixels, alpha = pixels[inside], alpha[inside]
        under = image[rows, columns]
        image[rows, columns] = under * (1 - alpha[..., None]) + pixels * placed.light
        masks[:i, rows, columns] &= alpha < 0.5
        masks[i, rows, columns] = alpha >= 0.5
    visible = [float(mask.sum()) / full for mask, full in zip(masks, whole, strict=True)]
    return np.clip(image, 0, 255).round().astype(np.uint8), masks, visible


@DATASETS.register_module()
class GeneratedCollages(GeneratedDataset):
    """Real objects pasted over real backgrounds, two of them alike in kind.

    A collage is a function of ``(seed, split, index)`` alone. Each item asks for one object of it,
    in validation and test for one whose size, side and kind training never shows together.

    Args:
        length: Collages in the set.
        image_size: Side in pixels. Defaults to 256.
        num_objects: Fewest and most objects of a collage, between 2 and 6. Defaults to (3, 4).
        paired: Adds a second frame in which every object has moved; two objects of one kind then
            differ in size, and captions describe the first frame. Defaults to False.
        max_shift: Farthest move along either axis, as a share of the side. Defaults to 0.15.
        split: ``'train'``, ``'val'`` or ``'test'``. Defaults to ``'train'``.
        image_dir: Folder of the photographs. Defaults to the one inside scikit-image.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: A photograph is not there.
        ValueError: An option is out of range.
    """

    least_objects = 2
    least_size = 64
    kind = 'object'

    def __init__(
        self,
        length: int,
        image_size: int = 256,
        num_objects: tuple[int, int] = (3, 4),
        paired: bool = False,
        max_shift: float = 0.15,
        split: str = 'train',
        image_dir: str | None = None,
        source: str = 'collages',
        **kwargs: Any,
    ) -> None:
        super().__init__(
            length, image_size, num_objects, paired, max_shift, split, source=source, **kwargs
        )
        self.combinations = combinations(split)
        #: What is asked for.
        self.may_be_asked = set(self.combinations if split == 'train' else held_out(split))
        folder = picture_dir() if image_dir is None else Path(image_dir)
        data = json.loads(CUTOUTS.read_text(encoding='utf-8'))
        records = [*data['objects'], *data['backgrounds']]
        require_pictures(folder, [record['file_name'] for record in records])

        def picture(record: dict[str, Any]) -> np.ndarray:
            name = record['file_name']
            return read_image(path_inside(folder, name, name), name)

        self.cutouts = {x['name']: cut_out(picture(x), x['outline']) for x in data['objects']}
        self.backgrounds: list[np.ndarray] = []
        for record in data['backgrounds']:
            left, top, right, bottom = record['box']
            self.backgrounds.append(picture(record)[top:bottom, left:right].copy())

    def draw(self, rng: np.random.Generator, count: int) -> Scene | None:
        """A scene of ``count`` objects; ``None`` where the draw breaks a rule."""
        chosen = self._choose(rng, count)
        if chosen is None:
            return None
        background = self._background(rng)
        objects = [self._place(rng, combination) for combination in chosen]
        image, masks, visible = compose(background, self.cutouts, objects)
        if min(visible) < MIN_VISIBLE:
            return None
        captions = [collage_caption(combination) for combination in chosen]
        attributes = [dict(zip(VALUES, combination, strict=True)) for combination in chosen]
        if not self.paired:
            return Scene(image, masks, captions, attributes)
        moved = [self._moved(rng, placed) for placed in objects]
        image2, masks2, visible = compose(background, self.cutouts, moved)
        if min(visible) < MIN_VISIBLE:
            return None
        return Scene(image, masks, captions, attributes, image2, masks2)

    def asked(self, scene: Scene) -> list[int]:
        """In validation and test those that training never shows."""
        found = [tuple(x[key] for key in VALUES) for x in scene.attributes]
        return [n for n, combination in enumerate(found) if combination in self.may_be_asked]

    def _choose(self, rng: np.random.Generator, count: int) -> list[Combination] | None:
        """One that may be asked for, its twin and others, in random order; or ``None``."""
        asked = sorted(self.may_be_asked)
        first = asked[int(rng.integers(len(asked)))]
        # With a second frame sides change, so twins have to differ in size.
        twins = [
            c
            for c in self.combinations
            if c[2] == first[2] and (c[0] != first[0]) + (c[1] != first[1]) == 1
            if not self.paired or c[0] != first[0]
        ]
        if not twins:
            return None
        chosen = [first, twins[int(rng.integers(len(twins)))]]
        while len(chosen) < count:
            chosen.append(self.combinations[int(rng.integers(len(self.combinations)))])
        told_apart_by = [(c[0], c[2]) if self.paired else c for c in chosen]
        if len(set(told_apart_by)) < count:
            return None
        return [chosen[i] for i in rng.permutation(count)]

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """``(S, S, 3)`` uint8: a square part of a photograph, in some light."""
        picture = self.backgrounds[int(rng.integers(len(self.backgrounds)))]
        height, width = picture.shape[:2]
        side = int(rng.uniform(0.6, 1.0) * min(height, width))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        part = picture[top : top + side, left : left + side]
        part = part[:, ::-1] if rng.random() < 0.5 else part
        size = self.image_size
        method = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
        part = cv2.resize(np.ascontiguousarray(part), (size, size), interpolation=method)
        light = rng.uniform(0.75, 1.2) * rng.uniform(0.9, 1.1, 3)
        return np.clip(part * light, 0, 255).astype(np.uint8)

    def _place(self, rng: np.random.Generator, combination: Combination) -> Placed:
        size, side, name = combination
        share = SIZES[size] * rng.uniform(0.9, 1.1)
        half_width, half_height = self._half_sides(name, share)
        third = SIDES.index(side)
        low, high = third / 3 + _THIRD_MARGIN, (third + 1) / 3 - _THIRD_MARGIN
        x = _between(rng, max(low, half_width), min(high, 1 - half_width), low, high)
        y = _between(rng, half_height, 1 - half_height, 0.0, 1.0)
        return Placed(combination, x, y, share, bool(rng.random() < 0.5), rng.uniform(0.75, 1.25))

    def _moved(self, rng: np.random.Generator, placed: Placed) -> Placed:
        """Somewhere near, with as much of it inside the picture."""
        sides = self._half_sides(placed.combination[2], placed.share)
        x, y = (
            _between(
                rng,
                max(centre - self.max_shift, half),
                min(centre + self.max_shift, 1 - half),
                centre,
                centre,
            )
            for centre, half in zip((placed.x, placed.y), sides, strict=True)
        )
        return replace(placed, x=x, y=y)

    def _half_sides(self, name: str, share: float) -> tuple[float, float]:
        """Half of an object's width and height, as shares of the picture's side."""
        alpha = self.cutouts[name].alpha
        scale = math.sqrt(share / float(alpha.sum())) / 2
        return alpha.shape[1] * scale, alpha.shape[0] * scale


def _between(rng: np.random.Generator, low: float, high: float, least: float, most: float) -> float:
    """A draw of ``[low, high]``; where that is empty, what is nearest to it in [least, most]."""
    if low <= high:
        return float(rng.uniform(low, high))
    return float(np.clip((low + high) / 2, least, most))
