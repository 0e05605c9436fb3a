"""The page that draws, asks and compares, and what it asks of the models.

Every answer goes both ways round: a region is described and its description segmented, a text is
segmented and what was found described. The page asks for nothing from outside.
"""

from __future__ import annotations

import base64
import hashlib
import io
import ipaddress
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageColor
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from projects.llava_sam2_rl.inference.cycles import (
    mask_to_caption_to_mask,
    text_to_mask_to_caption,
)
from projects.llava_sam2_rl.inference.pictures import read_image
from projects.llava_sam2_rl.inference.regions import Box, Points, Scribble
from projects.llava_sam2_rl.inference.sa2va import Sa2VA
from projects.llava_sam2_rl.utils.drawing import FOUND, REGION, fit, resize_image

_STATIC = Path(__file__).parent / 'static'
#: Of a photograph, and of a question, in bytes; of a text, in characters.
MAX_PHOTOGRAPH, MAX_QUESTION, MAX_TEXT = 64 * 2**20, 2**20, 2000
#: Photographs that are remembered; longest side of what the browser is shown of one, in pixels.
MAX_PHOTOGRAPHS, SHOWN = 8, 1600
#: Nothing from outside, and no code that stands in the page.
_POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"


class Photographs:
    """The last few photographs that were loaded, by a name made of their pixels."""

    def __init__(self) -> None:
        self._pixels: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, pixels: np.ndarray) -> str:
        """Remembers ``(H, W, 3)`` uint8 and forgets the oldest where there are too many."""
        name = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:24]
        with self._lock:
            self._pixels[name] = pixels
            self._pixels.move_to_end(name)
            while len(self._pixels) > MAX_PHOTOGRAPHS:
                self._pixels.popitem(last=False)
        return name

    def get(self, name: object) -> np.ndarray:
        """The pixels.

        Raises:
            HTTPException: 404, they were forgotten.
        """
        with self._lock:
            pixels = self._pixels.get(name) if isinstance(name, str) else None
        if pixels is None:
            raise HTTPException(404, 'the photograph is not here any more: load it again')
        return pixels


class Page:
    """What the browser may ask.

    Args:
        models: Each with what the page calls it, the base model first: its SAM 2 makes masks of
            boxes, points and scribbles, for all models the same.
    """

    def __init__(self, models: Sequence[tuple[str, Sa2VA]]) -> None:
        self.models = models
        self.photographs = Photographs()
        #: One question at a time: two would share a GPU's memory.
        self._busy = threading.Lock()

    async def index(self, request: Request) -> Response:
        """The page."""
        return FileResponse(
            _STATIC / 'index.html',
            headers={'Content-Security-Policy': _POLICY, 'Referrer-Policy': 'no-referrer'},
        )

    async def names(self, request: Request) -> Response:
        """What the models are called."""
        return JSONResponse({'models': [name for name, _ in self.models]})

    async def load(self, request: Request) -> Response:
        """Reads a photograph: its bytes are the body."""
        body = await _body(request, 'application/octet-stream', MAX_PHOTOGRAPH)
        pixels = await run_in_threadpool(read_image, io.BytesIO(body), 'the file')
        height, width = pixels.shape[:2]
        name = self.photographs.add(pixels)
        return JSONResponse({'image': name, 'width': width, 'height': height})

    async def show(self, request: Request) -> Response:
        """A photograph as it is shown, no larger than `SHOWN`."""
        pixels = self.photographs.get(request.path_params['name'])
        height, width = pixels.shape[:2]
        if max(height, width) > SHOWN:
            size = fit(height, width, SHOWN)
            pixels = await run_in_threadpool(resize_image, pixels, size)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, 'JPEG', quality=92)
        return Response(file.getvalue(), media_type='image/jpeg')

    async def describe(self, request: Request) -> Response:
        """Mask → caption → mask′ of a region by every model."""
        question = await _question(request)
        pixels = self.photographs.get(question.get('image'))
        region = read_region(question.get('region'), pixels.shape[1], pixels.shape[0])
        return JSONResponse(await run_in_threadpool(self._alone, self._describe, pixels, region))

    async def segment(self, request: Request) -> Response:
        """Text → mask → caption′ by every model."""
        question = await _question(request)
        pixels = self.photographs.get(question.get('image'))
        text = question.get('text')
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise ValueError(f'the text must be one of at most {MAX_TEXT} characters')
        return JSONResponse(await run_in_threadpool(self._alone, self._segment, pixels, text))

    def _alone(self, answer: Callable[..., Any], *args: Any) -> Any:
        with self._busy:
            return answer(*args)

    def _describe(self, pixels: np.ndarray, region: Any) -> dict[str, Any]:
        mask = self.models[0][1].region_mask(pixels, region)
        answers = []
        for name, model in self.models:
            started = time.perf_counter()
            cycle = mask_to_caption_to_mask(model, pixels, mask)
            found = cycle.returned is not None and cycle.returned.found
            answers.append(
                {
                    'model': name,
                    'caption': cycle.caption,
                    'mask': layer(cycle.returned.mask, FOUND) if cycle.returned else None,
                    'found': found,
                    'iou': cycle.iou,
                    'seconds': time.perf_counter() - started,
                }
            )
        return {'region': layer(mask, REGION), 'answers': answers}

    def _segment(self, pixels: np.ndarray, text: str) -> dict[str, Any]:
        answers = []
        for name, model in self.models:
            started = time.perf_counter()
            cycle = text_to_mask_to_caption(model, pixels, text)
            answers.append(
                {
                    'model': name,
                    'answer': cycle.found.answer,
                    'mask': layer(cycle.found.mask, FOUND),
                    'found': cycle.found.found,
                    'objects': len(cycle.found.masks),
                    'caption': cycle.caption,
                    'meteor': cycle.meteor,
                    'seconds': time.perf_counter() - started,
                }
            )
        return {'answers': answers}


def build_app(models: Sequence[tuple[str, Sa2VA]], host: str = '127.0.0.1') -> Starlette:
    """The application, for an ASGI server.

    Args:
        models: What the page calls them, and the models; the base model first.
        host: The address it is served at. Requests by another name are refused where that is of
            this machine alone, so that no page of the web can reach it by a name of its own.
            Defaults to ``'127.0.0.1'``.
    """
    page = Page(models)
    allowed = [host, 'localhost', '127.0.0.1', '[::1]'] if is_local(host) else ['*']
    return Starlette(
        routes=[
            Route('/', page.index),
            Route('/api/models', page.names),
            Route('/api/images', page.load, methods=['POST']),
            Route('/api/images/{name}', page.show),
            Route('/api/describe', page.describe, methods=['POST']),
            Route('/api/segment', page.segment, methods=['POST']),
            Mount('/static', StaticFiles(directory=_STATIC)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed)],
        exception_handlers={
            ValueError: lambda _, error: JSONResponse({'error': str(error)}, 422),
            HTTPException: _http_error,
            Exception: lambda _, error: JSONResponse(
                {'error': f'{type(error).__name__}: {error} (the terminal has more)'}, 500
            ),
        },
    )


def is_local(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


def read_region(region: object, width: int, height: int) -> Any:
    """A region as the page draws it.

    Args:
        region: ``kind`` and ``points``, pairs of x and y in pixels of the photograph: the corners
            of an ``'outline'``, two opposite ones of a ``'box'``, the stroke of a ``'scribble'``,
            or ``'points'`` with ``labels``.
        width: Of the photograph in pixels.
        height: Of the photograph in pixels.

    Returns:
        What `Sa2VA.region_mask` takes.

    Raises:
        ValueError: It is none of them.
    """
    if not isinstance(region, Mapping):
        raise ValueError('the question has no region: draw one on the photograph')
    try:
        points = np.array(region.get('points'), np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise ValueError('the points of a region are pairs of x and y') from error
    pairs = tuple((x, y) for x, y in points.tolist())
    kind, labels = region.get('kind'), region.get('labels')
    if not pairs:
        raise ValueError('the region is empty: draw one on the photograph')
    if not ((points >= 0) & (points <= (width, height))).all():  # nor a number, where it is none
        raise ValueError(f'the region reaches beyond the photograph, {width} x {height} pixels')
    if kind == 'outline':
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [np.rint(points).astype(np.int32)], [1])
        return mask.astype(bool)
    if kind == 'box':
        return Box(*points.min(axis=0).tolist(), *points.max(axis=0).tolist())
    if kind == 'scribble':
        return Scribble(pairs)
    if kind == 'points':
        if not isinstance(labels, list) or not all(label in (0, 1) for label in labels):
            raise ValueError('points have labels, 1 on the object and 0 beside it')
        return Points(pairs, tuple(labels))
    raise ValueError(f"there is no region {kind!r}: 'outline', 'box', 'points' or 'scribble'")


def layer(mask: np.ndarray, colour: str) -> str:
    """A mask as a picture to lie on its photograph: ``data:`` address of a PNG, clear outside.

    Args:
        mask: ``(H, W)`` bool.
        colour: A name or ``#rrggbb``.
    """
    height, width = fit(mask.shape[0], mask.shape[1], min(SHOWN, max(mask.shape)))
    small = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(small, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(small, contours, -1, 2, max(1, round(max(small.shape) / 250)))
    picture = Image.fromarray(small, mode='P')
    picture.putpalette([0, 0, 0, *ImageColor.getrgb(colour)[:3] * 2])
    file = io.BytesIO()
    picture.save(file, 'PNG', transparency=bytes([0, 110, 255]))
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


def _http_error(_: Request, error: Any) -> Response:
    return JSONResponse({'error': error.detail}, error.status_code)


async def _question(request: Request) -> dict[str, Any]:
    body = await _body(request, 'application/json', MAX_QUESTION)
    try:
        question = json.loads(body)
    except ValueError as error:
        raise HTTPException(400, f'the question is no JSON: {error}') from error
    if not isinstance(question, dict):
        raise HTTPException(400, 'the question is no JSON object')
    return question


async def _body(request: Request, media_type: str, limit: int) -> bytes:
    """The body, of a type that a page of another origin may not send unasked.

    Raises:
        HTTPException: 415, the type is another; 413, it is longer than the limit.
    """
    if request.headers.get('content-type', '').partition(';')[0].strip() != media_type:
        raise HTTPException(415, f'send {media_type}')
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f'more than {limit / 2**20:.0f} MiB: send less')
        parts.append(part)
    return b''.join(parts)
