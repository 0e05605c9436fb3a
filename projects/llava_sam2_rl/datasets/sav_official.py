"""SA-V as it is released: videos with masklets, every fourth frame annotated."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.frame_pairs import (
    check_gap,
    draw_shown_pair,
    fit_masks,
    spread_frames,
)
from projects.llava_sam2_rl.datasets.index_cache import cached_index
from projects.llava_sam2_rl.datasets.records import decode_rle, read_image, read_mask
from projects.llava_sam2_rl.datasets.video import read_video_frames
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

FPS = 24
#: Annotation t belongs to video frame 4 t.
FRAME_STEP = 4
KINDS = ('manual', 'auto')
FRAME_FOLDER, MASK_FOLDER = 'JPEGImages_24fps', 'Annotations_6fps'
#: A JSON file of masklets has a few megabytes.
MAX_JSON_BYTES = 256 << 20
_MASKLET_NUM = re.compile(rb'"masklet_num"\s*:\s*(\d{1,6})\s*\}\s*$')
_FRAME_FILE = re.compile(r'(\d+)\.png')


@DATASETS.register_module()
class SAVOfficialDataset(RegionDataset):
    """One record per masklet; two of the frames that show the object are drawn each time.

    Two layouts, told apart by what is there:

    - training set: ``{video_id}.mp4`` with ``{video_id}_manual.json`` and ``{video_id}_auto.json``
      beside it, at any depth below ``data_root``;
    - validation and test set: ``JPEGImages_24fps/{video_id}/{frame}.jpg`` with
      ``Annotations_6fps/{video_id}/{object}/{frame}.png``.

    An object that no pair of frames within ``pair_gap`` shows gives a single frame. With
    ``num_frames`` the two are the ends of a clip, whose other frames need not show the object.

    Args:
        data_root: Folder of the videos, or the one that holds both folders of frames.
        kinds: ``'manual'`` masklets, ``'auto'`` ones, or both; training set only.
        pair_gap: Least and most video frames (24 a second) from one frame to the other. Every
            fourth frame is annotated, so at least 4 to have an effect; ``None`` as second for no
            limit. Of a clip, from its first frame to its last.
        num_frames: T, frames of a clip, evenly spread over the annotated ones; at least 2. Defaults
            to 2: the two that were drawn.
        cache_dir: Folder of the index; see
            :func:`~projects.llava_sam2_rl.datasets.index_cache.cached_index`.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: Neither layout is there.
        ValueError: Unknown kind, or the gap is no range.
    """

    def __init__(
        self,
        data_root: str,
        kinds: Sequence[str] = ('manual',),
        pair_gap: Sequence[int | None] = (4, 96),
        num_frames: int = 2,
        cache_dir: str | None = None,
        source: str = 'sav',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        self.data_root = Path(data_root)
        self.pair_gap = check_gap(pair_gap, source)
        if num_frames < 2:
            raise ValueError(f'{source}: num_frames must be at least 2, got {num_frames}')
        self.num_frames = num_frames
        kinds = tuple(kinds)
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f'{source}: kinds are of {KINDS}, got {kinds}')
        self._in_folders = (self.data_root / MASK_FOLDER).is_dir()
        if self._in_folders:
            names = _object_folders(self.data_root / MASK_FOLDER)
            self._names, self._file, self._object = names, np.arange(len(names)), None
        else:
            names = _json_files(self.data_root, kinds)
            if len(names):
                paths = [self.data_root / os.fsdecode(bytes(name)) for name in names]
                index = cached_index(
                    paths, lambda: _count_masklets(paths), f'sav-{"-".join(kinds)}', cache_dir
                )
                self._names, self._file, self._object = names, index['file'], index['object']
        if not len(names):
            raise FileNotFoundError(
                f'{self.data_root} holds neither *_{"/".join(kinds)}.json beside their videos, nor '
                f'{FRAME_FOLDER} and {MASK_FOLDER}: unpack SA-V there, or correct data_root'
            )

    @property
    def num_records(self) -> int:
        """Masklets."""
        return len(self._file)

    def _name(self, index: int) -> str:
        return os.fsdecode(bytes(self._names[int(self._file[index])]))

    def sample_id(self, index: int) -> str:
        """``video_kind/number`` of a masklet, or ``video/object`` for folders of frames."""
        name = self._name(index).removesuffix('.json')
        return name if self._object is None else f'{name}/{int(self._object[index])}'

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads two frames of a masklet, drawn by ``rng``.

        Raises:
            BadRecord: ``missing_annotation`` or ``bad_annotation`` for the JSON file, ``bad_rle``,
                ``missing_mask``, ``corrupt_mask`` or ``mask_too_large`` for a mask,
                ``missing_video``, ``corrupt_video``, ``missing_frame``, ``missing_image``,
                ``corrupt_image`` or ``image_too_large`` for a frame, ``mask_aspect``, or
                ``empty_mask`` where no frame shows the object.
        """
        name = f'{self.source}/{self.sample_id(index)}'
        if self._object is None:
            folder = self.data_root / MASK_FOLDER / self._name(index)
            annotated = _annotated_frames(folder, name)
            masks = self._draw(
                annotated,
                annotated,
                lambda frame: read_mask(folder / f'{frame:05d}.png', name),
                rng,
            )
            frames = self.data_root / FRAME_FOLDER / folder.parent.name
            images = [
                read_image(frames / f'{frame:05d}.jpg', name, mask.shape)
                for frame, mask in masks.items()
            ]
        else:
            path = self.data_root / self._name(index)
            masklet = _read_masklet(path, int(self._object[index]), name)
            masks = self._draw(
                [FRAME_STEP * t for t, rle in enumerate(masklet) if rle is not None],
                [FRAME_STEP * t for t in range(len(masklet))],
                lambda frame: decode_rle(masklet[frame // FRAME_STEP], name),
                rng,
            )
            video = path.with_name(f'{path.stem.rpartition("_")[0]}.mp4')
            images = read_video_frames(video, list(masks), FPS, name) if masks else []
        if not masks:
            raise BadRecord('empty_mask', name, 'no frame shows the object')
        return RegionSample.of_clip(
            images,
            fit_masks(masks.values(), images, name),
            source=self.source,
            sample_id=self.sample_id(index),
        )

    def _draw(
        self,
        shown: Sequence[int],
        annotated: Sequence[int],
        read_mask: Callable[[int], np.ndarray],
        rng: np.random.Generator,
    ) -> dict[int, np.ndarray]:
        """Frame numbers with their masks, ascending.

        Args:
            shown: Frames that may show the object.
            annotated: All frames that a clip may have.
            read_mask: Gives the mask of a frame of ``shown``.
            rng: Draws the first frame and the last.
        """
        masks = draw_shown_pair(shown, self.pair_gap, read_mask, rng)
        if len(masks) < 2:
            return masks
        first, last = masks
        for frame in spread_frames(annotated, first, last, self.num_frames):
            if frame not in masks:
                masks[frame] = read_mask(frame) if frame in shown else np.zeros_like(masks[first])
        return dict(sorted(masks.items()))


def _json_files(root: Path, kinds: Sequence[str]) -> np.ndarray:
    endings = tuple(f'_{kind}.json' for kind in kinds)
    found = [
        os.fsencode(os.path.relpath(os.path.join(folder, file), root))
        for folder, _, files in os.walk(root)
        for file in files
        if file.endswith(endings)
    ]
    return np.array(sorted(found), dtype=np.bytes_)


def _object_folders(root: Path) -> np.ndarray:
    found = [
        os.fsencode(f'{video.name}/{entry.name}')
        for video in os.scandir(root)
        if video.is_dir()
        for entry in os.scandir(video.path)
        if entry.is_dir()
    ]
    return np.array(sorted(found), dtype=np.bytes_)


def _annotated_frames(folder: Path, record: str) -> list[int]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise BadRecord('missing_annotation', record, str(folder)) from error
    found = (_FRAME_FILE.fullmatch(name) for name in names)
    return sorted(int(match.group(1)) for match in found if match)


def _count_masklets(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """For every masklet its file's position in ``paths`` and its position in that file.

    A file that cannot be read counts as one masklet, so that it turns up among the bad records.
    """
    counts = np.array([_num_masklets(path) for path in paths], dtype=np.int64)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return {
        'file': np.repeat(np.arange(len(paths), dtype=np.int32), counts),
        'object': (np.arange(counts.sum()) - starts).astype(np.int32),
    }


def _num_masklets(path: Path) -> int:
    with open(path, 'rb') as file:
        # The count is the file's last entry; the rest is megabytes of masks.
        file.seek(max(path.stat().st_size - 256, 0))
        end = _MASKLET_NUM.search(file.read())
    if end:
        return int(end.group(1))
    try:
        return max((len(row) for row in _read_json(path, path.name)['masklet']), default=0)
    except (BadRecord, KeyError, TypeError):
        return 1


def _read_json(path: Path, record: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f'{path.stat().st_size} bytes, at most {MAX_JSON_BYTES} are read')
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BadRecord('missing_annotation', record, str(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadRecord('bad_annotation', record, f'{path}: {error}') from error
    if not isinstance(content, dict):
        raise BadRecord('bad_annotation', record, f'{path} holds a {type(content).__name__}')
    return content


def _read_masklet(path: Path, number: int, record: str) -> list[Any]:
    """The run-length codes of a masklet, one per annotated frame."""
    rows = _read_json(path, record).get('masklet')
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise BadRecord('bad_annotation', record, f'{path} has no list of lists "masklet"')
    short = [t for t, row in enumerate(rows) if number >= len(row)]
    if short or not rows:
        raise BadRecord(
            'bad_annotation', record, f'{path}: masklet {number} is not in annotation {short[:1]}'
        )
    return [row[number] for row in rows]
