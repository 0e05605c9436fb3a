"""Describe-anything: regions of pictures and videos with detailed descriptions."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from mmengine.logging import print_log

from projects.llava_sam2_rl.datasets.arrow_shards import (
    COLUMNS,
    ArrowShards,
    find_shards,
    region_row_sample,
)
from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.captions import category_name, draw_text, region_texts
from projects.llava_sam2_rl.datasets.frame_pairs import check_gap, draw_shown_pair, fit_masks
from projects.llava_sam2_rl.datasets.index_cache import cached_index
from projects.llava_sam2_rl.datasets.json_values import iterate_object, read_value
from projects.llava_sam2_rl.datasets.records import (
    decode_image,
    decode_rle,
    path_inside,
)
from projects.llava_sam2_rl.datasets.tar_members import read_member, tar_members
from projects.llava_sam2_rl.datasets.unpickle import load_plain_pickle
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

SPLITS = ('SAV', 'COCOStuff', 'LVIS', 'Mapillary', 'OpenImages', 'PACO', 'SAM')
_PICTURE = re.compile(r'(?P<stem>.+)\.(jpe?g|png)', re.IGNORECASE)
_FRAME = re.compile(r'(?P<key>.+)\.(?P<frame>\d{1,6})')
#: What a pickle that is not what it should be may raise, beside what the reader turns into
#: ``UnpicklingError``.
_PICKLE_ERRORS = (pickle.UnpicklingError, MemoryError, OverflowError, RecursionError)


@DATASETS.register_module()
class DescribeAnythingDataset(RegionDataset):
    """One record per described region of one split.

    Three shapes, told apart by what ``{data_root}/{split}`` holds:

    - ``annotations.json`` (``{id: region | [region, ...]}``) and ``images/*.tar`` with members
      ``{id}.jpg``; a region is ``{caption, category, mask_rle, image, tar_file, ...}``. Without
      ``annotations.json`` the ``{id}.pickle`` in the tars says the same.
    - the same with videos: members ``{id}.0.jpg``, ``{id}.1.jpg``, ... and ``mask_rle`` a list,
      one per frame. Two frames are drawn each time that show the object.
    - ``*.arrow`` with the columns ``image, mask_rle, category, image_id`` and ``conversations``
      or ``caption``.

    Tar members are read in place; pickles only through
    :func:`~projects.llava_sam2_rl.datasets.unpickle.load_plain_pickle`.

    Args:
        data_root: Folder of the splits.
        split: Folder of the split: SAV, COCOStuff, LVIS, Mapillary, OpenImages, PACO or SAM, or
            what you named it.
        pair_gap: Least and most frames from one frame of a video to the other, counted in the
            frames that the set has; ``None`` as second for no limit.
        max_regions: Arrow rows whose text speaks of more regions are bad records.
        cache_dir: Folder of the index; see
            :func:`~projects.llava_sam2_rl.datasets.index_cache.cached_index`.
        source: By default ``describe_anything_{split}``.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: The folder holds none of the three.
        ValueError: ``annotations.json`` is no JSON object, or the gap is no range.
    """

    def __init__(
        self,
        data_root: str,
        split: str = 'SAV',
        pair_gap: Sequence[int | None] = (1, None),
        max_regions: int = 16,
        cache_dir: str | None = None,
        source: str | None = None,
        **kwargs: Any,
    ) -> None:
        source = source or f'describe_anything_{split.lower()}'
        super().__init__(source=source, **kwargs)
        self.pair_gap = check_gap(pair_gap, source)
        self.max_regions = max_regions
        self.folder = Path(data_root) / split
        annotations = self.folder / 'annotations.json'
        tars = sorted([*self.folder.glob('*.tar'), *self.folder.glob('images/*.tar')])
        self._tars: _TarRegions | None = None
        self._shards: ArrowShards | None = None
        if annotations.is_file() or tars:
            self._tars = _TarRegions(
                annotations if annotations.is_file() else None, tars, cache_dir
            )
        elif shards := find_shards([self.folder]):
            self._shards = ArrowShards(shards, 'describe_anything', 'mask_rle', cache_dir)
        else:
            raise FileNotFoundError(
                f'{self.folder} holds neither annotations.json, nor *.tar, nor *.arrow: download '
                f'the split (of {", ".join(SPLITS)}) of nvidia/describe-anything-dataset there, '
                'or correct data_root and split'
            )

    @property
    def num_records(self) -> int:
        """Regions."""
        return len(self._tars if self._tars is not None else self._shards or ())

    def sample_id(self, index: int) -> str:
        """``id/number of the region``, or ``shard/row``."""
        if self._tars is not None:
            return self._tars.sample_id(index)
        assert self._shards is not None
        shard, row = self._shards.place(index)
        return f'{self._shards.paths[shard].stem}/{row}'

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads a region.

        Raises:
            BadRecord: ``bad_annotation``, ``bad_pickle``, ``unsafe_path``, ``missing_image``,
                ``corrupt_tar``, ``corrupt_image``, ``image_too_large``, ``missing_mask``,
                ``bad_rle``, ``mask_too_large``, ``mask_aspect``, ``empty_mask``, ``bad_caption``,
                ``bad_prompt_index``; for Arrow also ``corrupt_shard``, ``missing_shard`` and
                ``too_many_regions``.
        """
        sample_id = self.sample_id(index)
        name = f'{self.source}/{sample_id}'
        if self._tars is None:
            assert self._shards is not None
            row = self._shards.read(index, COLUMNS, name)
            return region_row_sample(
                row, self.folder, self.source, sample_id, self.max_regions, rng
            )
        frames = self._tars.frames(index, name)
        region, others = self._tars.region(index, name)
        text, _ = draw_text(region_texts(region, 1, name), rng)
        masks = self._masks(region.get('mask_rle'), sorted(frames), name, rng)
        images = [
            decode_image(frames[frame].read(name), name, mask.shape, str(frames[frame].path))
            for frame, mask in masks.items()
        ]
        fitted = fit_masks(masks.values(), images, name)
        paired = len(images) == 2
        captions = [c for o in others if isinstance(c := o.get('caption'), str) and c.strip()]
        return RegionSample(
            image=images[0],
            mask=fitted[0],
            caption=text.caption,
            image2=images[1] if paired else None,
            mask2=fitted[1] if paired else None,
            source=self.source,
            sample_id=sample_id,
            category=category_name(region.get('category')),
            distractor=captions[int(rng.integers(len(captions)))] if captions else None,
        )

    def _masks(
        self, code: Any, frames: Sequence[int], name: str, rng: np.random.Generator
    ) -> dict[int, np.ndarray]:
        """The mask of one frame, or of two that show the object, by frame number."""
        if code is None:
            raise BadRecord('missing_mask', name)
        if not isinstance(code, (list, tuple)):
            mask = decode_rle(code, name)
            masks = {frames[0]: mask} if mask.any() else {}
        else:
            shown = [frame for frame in frames if frame < len(code) and code[frame] is not None]
            if not shown:
                raise BadRecord('missing_mask', name, f'{len(code)} masks, {len(frames)} frames')
            masks = draw_shown_pair(
                shown, self.pair_gap, lambda frame: decode_rle(code[frame], name), rng
            )
        if not masks:
            raise BadRecord('empty_mask', name)
        return masks


@dataclass(frozen=True)
class _Place:
    """A member of an archive."""

    path: Path
    offset: int
    size: int

    def read(self, record: str) -> bytes:
        try:
            return read_member(self.path, self.offset, self.size)
        except ValueError as error:
            raise BadRecord('image_too_large', record, str(error)) from error
        except OSError as error:
            raise BadRecord('corrupt_tar', record, str(error)) from error


class _TarRegions:
    """Regions of ``annotations.json``, or of the pickles, with the places of their pictures."""

    def __init__(
        self, annotations: Path | None, tars: Sequence[Path], cache_dir: str | None
    ) -> None:
        self.annotations = annotations
        self.tars = list(tars)
        sources = [*([annotations] if annotations else []), *self.tars]
        self._index = cached_index(sources, self._build, 'describe_anything', cache_dir)

    def _build(self) -> dict[str, np.ndarray]:
        index = _Index()
        pictures = _Pictures(self.tars)
        if self.annotations is None:
            values: Iterable = pictures.pickled_regions()
        else:
            values = ((key, v, -1, *at) for key, v, *at in iterate_object(self.annotations))
        for key, value, *place in values:
            regions = value if isinstance(value, list) else [value]
            for number, region in enumerate(regions):
                # -1 as number: the value is the region itself.
                number = number if isinstance(value, list) else -1
                safe, frames = pictures.of_region(key, region)
                index.add(key, number, place, safe, frames)
        return index.arrays()

    def __len__(self) -> int:
        return len(self._index['value'])

    def sample_id(self, index: int) -> str:
        key = os.fsdecode(bytes(self._index['key'][index]))
        return f'{key}/{max(int(self._index["value"][index, 0]), 0)}'

    def region(self, index: int, name: str) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
        """A region and the others of its picture."""
        number, tar, start, length = self._index['value'][index].tolist()
        if tar < 0:
            assert self.annotations is not None
            try:
                value = read_value(self.annotations, start, length)
            except (OSError, ValueError) as error:
                raise BadRecord('bad_annotation', name, str(error)) from error
        else:
            try:
                value = _unpickled(_Place(self.tars[tar], start, length).read(name))
            except _PICKLE_ERRORS as error:
                raise BadRecord('bad_pickle', name, str(error)) from error
        regions = value if isinstance(value, list) else [value]
        number = max(number, 0)
        if number >= len(regions) or not isinstance(regions[number], Mapping):
            raise BadRecord('bad_annotation', name, 'no region')
        others = [r for i, r in enumerate(regions) if i != number and isinstance(r, Mapping)]
        return regions[number], others

    def frames(self, index: int, name: str) -> dict[int, _Place]:
        """The places of a region's pictures by frame number, 0 for a single picture."""
        if not self._index['safe'][index]:
            raise BadRecord('unsafe_path', name, 'a file name leaves the folder')
        first, end = self._index['frames'][index : index + 2].tolist()
        if first == end:
            raise BadRecord('missing_image', name, f'not in the {len(self.tars)} tars')
        return {
            frame: _Place(self.tars[tar], offset, size)
            for frame, tar, offset, size in self._index['frame'][first:end].tolist()
        }


@dataclass
class _Index:
    """Collects the arrays of :class:`_TarRegions`."""

    keys: list[bytes] = field(default_factory=list)
    #: Number in the list of regions, tar (-1: annotations.json), first byte, bytes.
    value: array[int] = field(default_factory=lambda: array('q'))
    safe: list[bool] = field(default_factory=list)
    #: For every region, where its frames begin in the next array.
    frames: array[int] = field(default_factory=lambda: array('q', [0]))
    #: Number of the frame, tar, first byte, bytes.
    frame: array[int] = field(default_factory=lambda: array('q'))

    def add(
        self,
        key: str,
        number: int,
        place: Sequence[int],
        safe: bool,
        frames: Sequence[tuple[int, ...]],
    ) -> None:
        self.keys.append(key.encode()[:200])
        self.value.extend((number, *place))
        self.safe.append(safe)
        for frame in frames:
            self.frame.extend(frame)
        self.frames.append(len(self.frame) // 4)

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            'key': np.array(self.keys, dtype=np.bytes_),
            'value': np.array(self.value, dtype=np.int64).reshape(-1, 4),
            'safe': np.array(self.safe, dtype=bool),
            'frames': np.array(self.frames, dtype=np.int64),
            'frame': np.array(self.frame, dtype=np.int64).reshape(-1, 4),
        }


class _Pictures:
    """What the archives of a split hold, while its index is built."""

    def __init__(self, tars: Sequence[Path]) -> None:
        self.tars = tars
        self._tar_number = {path.name: number for number, path in enumerate(tars)}
        #: By name without ending: number of the frame, tar, first byte, bytes.
        self._single: dict[str, list[tuple[int, ...]]] = {}
        self._frames: dict[str, list[tuple[int, ...]]] = {}
        self._pickles: list[tuple[str, int, int, int, bool]] = []
        unsafe = 0
        for number, path in enumerate(tars):
            for member in tar_members(path):
                name = PurePosixPath(member.name).name
                if name.endswith('.pickle'):
                    stem = name.removesuffix('.pickle')
                    self._pickles.append((stem, number, member.offset, member.size, member.safe))
                unsafe += not member.safe
                picture = _PICTURE.fullmatch(name)
                if picture is None or not member.safe:
                    continue
                place = (number, member.offset, member.size)
                self._single.setdefault(picture['stem'], []).append((0, *place))
                if frame := _FRAME.fullmatch(picture['stem']):
                    entry = (int(frame['frame']), *place)
                    self._frames.setdefault(frame['key'], []).append(entry)
        if unsafe:
            print_log(
                f'{tars[0].parent}: {unsafe} members of the archives are links or have names that '
                'leave the folder, and are not read',
                logger='current',
                level=logging.WARNING,
            )

    def pickled_regions(self) -> Iterator[tuple[Any, ...]]:
        """``(key, value, tar, first byte, bytes)`` of every pickle; value ``None`` if unread."""
        for stem, number, offset, size, safe in self._pickles:
            value = None
            if safe:
                try:
                    value = _unpickled(read_member(self.tars[number], offset, size))
                except (*_PICKLE_ERRORS, OSError, ValueError):
                    pass  # Reading the record says what is wrong.
            yield stem, value if safe else {'image': '../'}, number, offset, size

    def of_region(self, key: str, region: Any) -> tuple[bool, list[tuple[int, ...]]]:
        """Whether a region's file names are safe, and its frames in any order."""
        region = region if isinstance(region, Mapping) else {}
        names = [region.get(field) for field in ('image', 'tar_file')]
        names = [name for name in names if isinstance(name, str) and name]
        try:
            for name in (*names, key):
                path_inside(Path(), name, key)
        except BadRecord:
            return False, []
        tar = region.get('tar_file')
        wanted = self._tar_number.get(PurePosixPath(tar).name) if isinstance(tar, str) else None
        image = region.get('image')
        stems = [key, str(region.get('img_id', key))]
        if isinstance(image, str):
            stems.append(PurePosixPath(image).stem)
        video = isinstance(region.get('mask_rle'), (list, tuple))
        for found in (self._frames, self._single) if video else (self._single, self._frames):
            for stem in stems:
                if places := found.get(stem):
                    # Of an id that several archives hold, the one that the region names.
                    own = [place for place in places if place[1] == wanted] or places
                    own = [place for place in own if place[1] == own[0][1]]
                    return True, own
        return True, []


def _unpickled(data: bytes) -> Any:
    return load_plain_pickle(io.BytesIO(data))
