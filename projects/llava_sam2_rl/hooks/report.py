"""Keeps what the training report needs, and writes the report at each checkpoint."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import resource
import sys
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import Hook

from projects.llava_sam2_rl import report
from projects.llava_sam2_rl.engine.checkpoint_files import write_atomically
from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.hooks.bad_records import BadRecordHook
from projects.llava_sam2_rl.hooks.rollouts import clip_frames, first_frame, second_frame
from projects.llava_sam2_rl.registry import HOOKS
from projects.llava_sam2_rl.report.pictures import BOX, encode_jpeg, encode_mask
from projects.llava_sam2_rl.rewards import clip_iou, mask_iou
from projects.llava_sam2_rl.utils.drawing import fit, resize_image, resize_mask

_FOLDER = 'report'


@HOOKS.register_module()
class ReportHook(Hook):
    """``<work_dir>/report.html`` at each checkpoint, after each validation and at the end.

    The page is made by `projects.llava_sam2_rl.report` from files alone, and can be made again by
    ``python tools/report.py WORK_DIR``. What mmengine does not leave is written here:

    - ``validations/iter_N.jsonl``, a line per held-out region: ``name``, ``reference``,
      ``caption``, ``caption_return``, ``iou`` of the way back, ``own_iou`` of the mask found for
      the reference, ``weights`` (``policy`` or ``teacher``). The first ``max_regions`` also have
      ``image`` and ``target_image`` (names in ``validations/images.zip``) and ``region``,
      ``target`` and ``found``, masks as COCO run lengths at the pictures' size. Of a clip ``iou``
      is the mean over all frames, and ``clip`` has ``images``, ``target`` and ``found`` of each.
    - ``report/run.json``: config changes, environment, starts of the run.
    - ``report/progress.jsonl``: records read and skipped, seconds by phase, memory.

    The examples of the page go to the back ends of mmengine's visualizer too.

    Args:
        validate_first: Whether a run that starts from step 0 is validated before its first step.
        max_regions: Held-out regions whose pictures are kept.

    Raises:
        ValueError: ``max_regions`` is below 1.
    """

    # After every hook that leaves something to report.
    priority = 'LOWEST'

    def __init__(self, validate_first: bool = False, max_regions: int = 256) -> None:
        if max_regions < 1:
            raise ValueError(f'max_regions must be at least 1, got {max_regions}')
        self.validate_first = validate_first
        self.max_regions = max_regions
        #: How often something of the report could not be made; training went on.
        self.failures = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._mark = time.perf_counter()
        self._start: dict[str, Any] = {}
        self._last_checkpoint: str | None = None
        self._saving = self._validating = False
        self._rows: list[dict[str, Any]] = []
        self._known_images: set[str] = set()

    # ------------------------------------------------------------------ when

    def before_train(self, runner: Any) -> None:
        """Notes where and on what the run starts."""
        self._mark = time.perf_counter()
        self._start = {'start': runner.timestamp, 'from': runner.iter}
        self._last_checkpoint = runner.message_hub.get_info('last_ckpt')
        if is_main_process():
            self._guarded(runner, 'its facts', lambda: self._write_facts(runner))

    def before_train_epoch(self, runner: Any) -> None:
        """The validation before training, where one is wanted."""
        if self.validate_first and runner.iter == 0 and runner.val_loop is not None:
            runner.logger.info('Validating before the first step, for the report')
            runner.val_loop.run()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """The batch is there."""
        self._ends('waiting for data')

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """A checkpoint is about to be written."""
        if not self._validating:
            self._ends('training steps')
            self._saving = True

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Writes the report where a checkpoint was written."""
        self._ends('checkpoints' if self._saving else 'training steps')
        self._saving = False
        # Known to all ranks, by any hook and any interval.
        checkpoint = runner.message_hub.get_info('last_ckpt')
        if checkpoint != self._last_checkpoint:
            self._last_checkpoint = checkpoint
            self._report(runner, runner.iter + 1)

    def before_val(self, runner: Any) -> None:
        """Begins to collect the regions of a validation."""
        self._ends('training steps')
        self._validating = True
        self._rows = []
        known = [self._guarded(runner, 'its pictures', lambda: _image_names(_images(runner)))]
        broadcast_object_list(known)
        self._known_images = known[0] or set()

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Collects the regions of a batch, where the validation runs the cycle."""
        if outputs and isinstance(outputs[0], Mapping) and 'target_mask' in outputs[0]:
            self._guarded(runner, 'its regions', lambda: self._collect(runner, data_batch, outputs))

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Writes the regions of a validation, then the report."""
        gathered = all_gather_object(self._rows)
        self._rows = []
        # Ranks take turns in the data set, and its last samples may be repeated.
        in_order = (row for turn in zip_longest(*gathered) for row in turn if row is not None)
        rows = {row['name']: row for row in in_order}
        training = bool(self._start)  # not `xtuner test`, nor a runner's `val`
        if rows and training and is_main_process():
            self._guarded(
                runner, 'its regions', lambda: self._write_validation(runner, list(rows.values()))
            )
        self._ends('validation')
        self._validating = False
        if training:
            self._report(runner, runner.iter, pictures=bool(rows))

    def after_train(self, runner: Any) -> None:
        """The last report."""
        self._report(runner, runner.iter)
        if self.failures:
            runner.logger.error(
                f'The report could not be made {self.failures} times, see the tracebacks above; '
                f'`python tools/report.py {runner.work_dir}` makes it from what the run left'
            )

    def _ends(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] += now - self._mark
        self._mark = now

    # ------------------------------------------------------------------ what

    def _guarded(self, runner: Any, what: str, work: Any) -> Any:
        """``work()``; a failure is logged and counted, and training goes on.

        The one place of this project that lets any error pass: a report says what a training
        did, and days of training must not end for it. Nothing is swallowed: the traceback is
        logged as an error each time, and the number of failures at the end. Collective calls stay
        outside, so that a rank that fails leaves no other waiting.
        """
        try:
            return work()
        except Exception:
            self.failures += 1
            runner.logger.error(
                f'The report failed at {what} (failure {self.failures}); training goes on\n'
                f'{traceback.format_exc()}'
            )
            return None

    def _report(self, runner: Any, step: int, pictures: bool = False) -> None:
        read, bad = Counter[str](), Counter[tuple[str, str]]()
        counters = [hook for hook in runner.hooks if isinstance(hook, BadRecordHook)]
        counted = [(hook.read, hook.bad) for hook in counters]
        for rank_read, rank_bad in chain.from_iterable(all_gather_object(counted)):
            read.update(rank_read)
            bad.update(rank_bad)
        if is_main_process():
            self._guarded(
                runner, 'the page', lambda: self._write(runner, step, read, bad, pictures)
            )
        self._ends('report')

    def _write(
        self,
        runner: Any,
        step: int,
        read: Counter[str],
        bad: Counter[tuple[str, str]],
        pictures: bool,
    ) -> None:
        folder = Path(runner.work_dir)
        line = {
            **self._start,
            'iter': step,
            'read': read,
            'bad': [[source, reason, count] for (source, reason), count in sorted(bad.items())],
            'seconds': {phase: round(value, 3) for phase, value in self._seconds.items()},
            'host_memory': _peak_memory(),
        }
        file = folder / _FOLDER / 'progress.jsonl'
        earlier = file.read_text(encoding='utf-8') if file.is_file() else ''
        write_atomically(file, (earlier + json.dumps(line) + '\n').encode())
        page = report.make_report(folder)
        write_atomically(folder / report.FILENAME, page.html.encode())
        if pictures:
            for name, picture in report.example_pictures(folder, page.examples).items():
                runner.visualizer.add_image(f'examples/{name}', picture, step)

    def _write_facts(self, runner: Any) -> None:
        file = Path(runner.work_dir) / _FOLDER / 'run.json'
        starts = json.loads(file.read_text())['starts'] if file.is_file() else []
        config_file = runner.cfg.filename
        facts = {
            'config_file': config_file and Path(config_file).name,
            'max_iters': runner.max_iters,
            'starts': [*starts, self._start],
            'config_changes': report.config_changes(runner.cfg),
            'environment': {**report.environment(), 'processes': str(get_world_size())},
        }
        write_atomically(file, json.dumps(facts, indent=1, ensure_ascii=False).encode())

    # ----------------------------------------------------- held-out regions

    def _collect(
        self, runner: Any, batch: Mapping[str, Any], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        weights = unwrapped(runner).predict_with
        data = batch['data']
        for i, (meta, output) in enumerate(zip(batch['data_samples'], outputs, strict=True)):
            masks, tracks = output['masks'], output['tracks']
            row = {
                'name': meta.name,
                'reference': output['reference'],
                'caption': output['caption'],
                'caption_return': output['caption_return'],
                'iou': (
                    clip_iou(tracks['generated'], tracks['gt'])
                    if tracks
                    else _iou(masks['generated'], output['target_mask'])
                ),
                'own_iou': (
                    _iou(masks['reference'], output['gt_mask']) if 'reference' in masks else None
                ),
                'weights': weights,
            }
            if len(self._rows) < math.ceil(self.max_regions / get_world_size()):
                self._draw(row, data, i, output)
            self._rows.append(row)

    def _draw(
        self, row: dict[str, Any], data: Mapping[str, Any], i: int, output: Mapping[str, Any]
    ) -> None:
        """Adds masks, names of pictures, and the pictures themselves where they are new."""
        second = second_frame(data, i)
        stem = hashlib.sha256(row['name'].encode()).hexdigest()[:20]
        row['image'] = row['target_image'] = f'{stem}.jpg'
        row['region'] = _small(output['gt_mask'])
        row['target'] = _small(output['target_mask'])
        row['found'] = _small(output['masks']['generated'])
        frames = {row['image']: (first_frame(data, i), output['gt_mask'])}
        if second is not None:
            row['target_image'] = f'{stem}_2.jpg'
            frames[row['target_image']] = (second, output['target_mask'])
        if tracks := output['tracks']:
            names = [row['image'], *(f'{stem}_of_{t + 1}.jpg' for t in range(1, len(tracks['gt'])))]
            frames |= dict(zip(names, zip(clip_frames(data, i), tracks['gt'])))
            row['clip'] = {
                'images': names,
                'target': [_small(mask) for mask in tracks['gt']],
                'found': [_small(mask) for mask in tracks['generated']],
            }
        # As text, in which the rows of all ranks come together.
        row['jpeg'] = {
            name: base64.b64encode(encode_jpeg(resize_image(frame, _size(mask)))).decode()
            for name, (frame, mask) in frames.items()
            if name not in self._known_images
        }

    def _write_validation(self, runner: Any, rows: list[dict[str, Any]]) -> None:
        new = {
            name: base64.b64decode(jpeg)
            for row in rows
            for name, jpeg in row.pop('jpeg', {}).items()
        }
        file = _images(runner)
        if new:
            buffer = io.BytesIO(file.read_bytes() if file.is_file() else b'')
            with zipfile.ZipFile(buffer, 'a') as archive:
                for name, jpeg in new.items():
                    archive.writestr(name, jpeg)
            write_atomically(file, buffer.getvalue())
        lines = ''.join(json.dumps(row, allow_nan=False) + '\n' for row in rows)
        write_atomically(file.with_name(f'iter_{runner.iter:08d}.jsonl'), lines.encode())


def _images(runner: Any) -> Path:
    return Path(runner.work_dir) / 'validations/images.zip'


def _image_names(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def _iou(found: Any, truth: Any) -> float:
    return float(mask_iou(found[None], truth[None])[0])


def _size(mask: Any) -> tuple[int, int]:
    """Of the picture of an image with this mask, never larger than the image."""
    height, width = mask.shape
    return fit(height, width, min(BOX, max(height, width)))


def _small(mask: Any) -> dict[str, Any]:
    return encode_mask(resize_mask(np.asarray(mask.cpu()), _size(mask)))


def _peak_memory() -> int:
    """Most memory this process ever held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024
