"""Expressions in clips, in the layout of ``meta_expressions.json`` that video benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets.base import BadRecord, Changed, RecordDataset
from projects.llava_sam2_rl.datasets.mask_dictionary import MaskDictionary
from projects.llava_sam2_rl.datasets.records import (
    checked_rle,
    image_size,
    path_inside,
    required_file,
)
from projects.llava_sam2_rl.datasets.texts import UnusableText, plain_text
from projects.llava_sam2_rl.prompts import neutralize_name
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import ClipSample, RunLengths


@dataclass(frozen=True)
class _Expression:
    video: str
    name: str
    #: As the file has it.
    content: Any
    #: Its number among all expressions, by which benchmarks without ``anno_id`` know its masks.
    number: int


@DATASETS.register_module()
class MetaExpressionsDataset(RecordDataset):
    """One record per expression; an item is ``{'clip': ClipSample}`` and holds no pixels.

    Layout: ``expressions`` is ``{"videos": {video: {"frames": [name], "expressions": {id: {"exp",
    "anno_id", …}}}}}``; pictures are ``{image_dir}/{video}/{frame}.jpg``, those of a video of one
    size; ``masks`` has for each object one run-length code, or null, per frame. Frames are in the
    order of their names, and so are the expressions of a video, ids compared as text. The masks of
    several objects of an expression are united; as officially, an empty list of objects means that
    there is nothing to be found.

    Bad records, by reason: ``no_frames``, ``bad_expression`` (no object with a text ``exp``),
    ``empty_expression``, ``long_caption``, ``no_objects`` (no ``anno_id``), ``unknown_type``,
    ``missing_video``, ``missing_image``, ``corrupt_image``, ``image_too_large``, ``frame_size``
    (frames that differ), ``missing_annotation`` (an object without masks), ``bad_annotation``,
    ``frame_count`` (masks for another number of frames), ``mask_size`` (of another size than the
    frames), ``bad_rle``, ``unsafe_path``.

    Args:
        expressions: The JSON file, absolute or below ``data_root``.
        image_dir: Folder of the videos, likewise.
        masks: The dictionary of masks, ``.json`` or ``.pkl``, likewise. Defaults to None: the
            benchmark keeps its masks to itself.
        data_root: Folder of the download. Defaults to the folder where the run is started.
        source: Name of the source in logs and reports.
        foreground: The dictionary ``{video: {"masks_rle": [code per frame]}}`` of all objects of a
            video together, which ReVOS has. Defaults to None.
        groups: Name of each kind of expression by its ``type_id``. Defaults to None: there are
            none.
        numbered: Where expressions have no ``anno_id``, their masks are found by their number:
            videos ``'by_name'`` or ``'as_listed'`` in the file. Defaults to None: by ``anno_id``.
        cache_dir: Folder of the index of ``masks``, see `cached_index`.
        max_caption_tokens: Longest expression in tokens, see `RegionDataset`. Defaults to 512.
        **kwargs: See `RecordDataset`.

    Raises:
        FileNotFoundError: A file or the folder of the videos is not there.
        ValueError: A file holds something else.
    """

    #: What to do where a file is missing.
    download = 'see docs/datasets.md, "Video benchmarks"'

    def __init__(
        self,
        expressions: str,
        image_dir: str,
        masks: str | None = None,
        data_root: str = '',
        source: str = 'video',
        foreground: str | None = None,
        groups: Mapping[int, str] | None = None,
        numbered: Literal['by_name', 'as_listed'] | None = None,
        cache_dir: str | None = None,
        max_caption_tokens: int | None = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        if numbered not in (None, 'by_name', 'as_listed'):
            raise ValueError(f"{source}: numbered is 'by_name', 'as_listed' or None: {numbered!r}")
        root = Path(data_root)
        self.image_dir = root / image_dir
        path = required_file(root / expressions, self.download)
        if not self.image_dir.is_dir():
            raise FileNotFoundError(f'{self.image_dir} is no folder of videos: {self.download}')
        self._masks, self._foreground = (
            None
            if name is None
            else MaskDictionary(required_file(root / name, self.download), cache_dir)
            for name in (masks, foreground)
        )
        self.groups = None if groups is None else dict(groups)
        self.numbered = numbered
        self.max_caption_tokens = max_caption_tokens
        self._videos = _read_videos(path)
        self._expressions = list(_listed(self._videos, by_name=numbered == 'by_name'))
        if not self._expressions:
            raise ValueError(f'{path} holds no expression: {self.download}')
        #: Of the video that was asked for last: its name, frames and their size.
        self._last: tuple[str, tuple[Path, ...], tuple[int, int]] | None = None

    @property
    def has_masks(self) -> bool:
        """Whether the set's masks are here."""
        return self._masks is not None

    @property
    def num_records(self) -> int:
        """Expressions."""
        return len(self._expressions)

    def sample_id(self, index: int) -> str:
        """``video/expression``."""
        expression = self._expressions[index]
        return f'{expression.video}/{expression.name}'

    def image_key(self, index: int) -> str:
        """The video."""
        return self._expressions[index].video

    def make_item(
        self, record: int, rng: np.random.Generator
    ) -> tuple[dict[str, Any], list[Changed]]:
        """The expression, the paths of its frames and the run lengths of its masks."""
        sample = self.read_clip(record)
        try:
            text, kinds = plain_text(sample.caption, self.max_caption_tokens)
        except UnusableText as error:
            raise BadRecord(error.reason, self._name(record), error.detail) from error
        if not text.strip(' .'):
            raise BadRecord('empty_expression', self._name(record), f'{sample.caption!r:.80}')
        changed = [(self.source, sample.sample_id, kind) for kind in kinds.elements()]
        return {'clip': replace(sample, caption=text)}, changed

    def read_clip(self, record: int) -> ClipSample:
        """Record ``record`` with its expression as the file has it, but for white space.

        Raises:
            BadRecord: The record cannot be used.
        """
        expression = self._expressions[record]
        name = self._name(record)
        content = expression.content
        if not isinstance(content, dict) or not isinstance(content.get('exp'), str):
            raise BadRecord('bad_expression', name, f'{content!r:.80}')
        text = ' '.join(content['exp'].split())
        if not text.strip(' .'):
            raise BadRecord('empty_expression', name, f'{content["exp"]!r:.80}')
        frames, size = self._frames(expression.video, name)
        # It names a folder of what is handed in.
        path_inside(self.image_dir, expression.name, name)
        return ClipSample(
            source=self.source,
            sample_id=neutralize_name(self.sample_id(record))[0],
            video=expression.video,
            expression=expression.name,
            caption=text,
            frames=frames,
            height=size[0],
            width=size[1],
            masks=self._object_masks(expression, len(frames), size, name),
            foreground=self._foreground_masks(expression, len(frames), size, name),
            group=self._group(content, name),
        )

    def _group(self, content: Mapping[str, Any], record: str) -> str | None:
        if self.groups is None:
            return None
        kind = content.get('type_id')
        if not isinstance(kind, int) or kind not in self.groups:
            raise BadRecord('unknown_type', record, f'type_id {kind!r}, known are {self.groups}')
        return self.groups[kind]

    def _frames(self, video: str, record: str) -> tuple[tuple[Path, ...], tuple[int, int]]:
        """The pictures of a video and the size that all of them have."""
        if self._last is not None and self._last[0] == video:
            return self._last[1:]
        names = self._videos[video].get('frames')
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise BadRecord('no_frames', record, f'the frames of {video!r} are {names!r:.80}')
        folder = path_inside(self.image_dir, video, record)
        if not folder.is_dir():
            raise BadRecord('missing_video', record, str(folder))
        paths = tuple(path_inside(folder, f'{name}.jpg', record) for name in sorted(names))
        sizes = [image_size(path, record) for path in paths]
        for path, size in zip(paths, sizes, strict=True):
            if size != sizes[0]:
                raise BadRecord(
                    'frame_size',
                    record,
                    f'{path} is {size[1]} x {size[0]}, the first frame {sizes[0][1]} x '
                    f'{sizes[0][0]} (width x height)',
                )
        self._last = (video, paths, sizes[0])
        return paths, sizes[0]

    def _object_masks(
        self, expression: _Expression, length: int, size: tuple[int, int], record: str
    ) -> tuple[RunLengths | None, ...] | None:
        if self._masks is None:
            return None
        ids: Any = [expression.number]
        if self.numbered is None:
            given = expression.content.get('anno_id')
            ids = [given] if isinstance(given, int | str) else given
            if not isinstance(ids, list):
                raise BadRecord('no_objects', record, f'anno_id is {given!r:.80}')
        objects = [self._masks.get(str(one), record) for one in ids]
        for one, codes in zip(ids, objects, strict=True):
            _check_codes(codes, length, record, f'object {one}')
        return tuple(_united([codes[t] for codes in objects], size, record) for t in range(length))

    def _foreground_masks(
        self, expression: _Expression, length: int, size: tuple[int, int], record: str
    ) -> tuple[RunLengths | None, ...] | None:
        if self._foreground is None:
            return None
        value = self._foreground.get(expression.video, record)
        codes = value.get('masks_rle') if isinstance(value, dict) else None
        _check_codes(codes, length, record, f'the foreground of {expression.video}')
        return tuple(
            _united(one if isinstance(one, list) else [one], size, record) for one in codes or ()
        )


def _read_videos(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON: {error}') from error
    videos = content.get('videos') if isinstance(content, dict) else None
    if not isinstance(videos, dict) or not all(isinstance(v, dict) for v in videos.values()):
        raise ValueError(f'{path} has no "videos" with an object each')
    return videos


def _listed(videos: Mapping[str, Mapping[str, Any]], by_name: bool) -> list[_Expression]:
    found: list[_Expression] = []
    for video in sorted(videos) if by_name else videos:
        expressions = videos[video].get('expressions')
        # A video without any is none of the benchmark; a broken one is a bad record.
        if not isinstance(expressions, dict):
            expressions = {} if expressions is None else {'': expressions}
        for name in sorted(expressions):
            found.append(_Expression(video, name, expressions[name], len(found)))
    return found


def _check_codes(codes: Any, length: int, record: str, what: str) -> None:
    if not isinstance(codes, list | tuple):
        raise BadRecord('bad_annotation', record, f'the masks of {what} are {codes!r:.40}')
    if len(codes) != length:
        raise BadRecord('frame_count', record, f'{what}: {len(codes)} masks for {length} frames')


def _united(codes: list[Any], size: tuple[int, int], record: str) -> RunLengths | None:
    """One code of a frame's masks, ``None`` where there is none."""
    checked = [checked_rle(code, record) for code in codes if code]
    for code in checked:
        if tuple(code['size']) != size:
            raise BadRecord('mask_size', record, f'a mask of {code["size"]}, frames of {size}')
    if len(checked) < 2:
        return checked[0] if checked else None
    return coco_mask.merge(checked)
