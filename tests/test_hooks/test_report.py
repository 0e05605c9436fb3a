from __future__ import annotations

import importlib.util
import json
import os
import struct
import time
import zipfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import VISUALIZERS
from PIL import Image
from pycocotools import mask as coco
from torch import nn

from projects.llava_sam2_rl import report
from projects.llava_sam2_rl.hooks import BadRecordHook, EMATeacherHook, ReportHook
from projects.llava_sam2_rl.hooks import report as module
from projects.llava_sam2_rl.structures import RegionMeta
from test_hooks.processes import ranks
from test_hooks.toy import build


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def hooks(**options):
    return [dict(type=EMATeacherHook), dict(type=ReportHook, **options)]


# ------------------------------------------------------------- under mmengine's runner


def test_at_each_checkpoint_after_each_validation_and_at_the_end(tmp_path):
    build(tmp_path, max_iters=6, interval=2, val_interval=3, hooks=hooks()).train()
    progress = lines(tmp_path / 'report/progress.jsonl')
    assert [line['iter'] for line in progress] == [2, 3, 4, 6, 6, 6]
    assert {'training steps', 'validation', 'checkpoints', 'waiting for data', 'report'} == set(
        progress[-1]['seconds']
    )
    html = (tmp_path / 'report.html').read_text()
    assert 'Step 6 of 6 (complete)' in ' '.join(html.split())
    assert not list(tmp_path.rglob('*.incomplete'))


def test_a_validation_before_the_first_step_and_none_at_a_restart(tmp_path):
    first = hooks(validate_first=True)
    build(tmp_path, max_iters=2, interval=2, val_interval=2, hooks=first).train()
    file = tmp_path / 'report/progress.jsonl'
    # The validation, the checkpoint, the second validation, the end.
    assert [line['iter'] for line in lines(file)] == [0, 2, 2, 2]
    build(tmp_path, max_iters=4, interval=2, val_interval=2, hooks=first, resume=True).train()
    assert [(line['from'], line['iter']) for line in lines(file)[4:]] == [(2, 4)] * 3
    assert list(report.logs.read_scalars(tmp_path).training) == [1, 2, 3, 4]
    starts = json.loads((tmp_path / 'report/run.json').read_text())['starts']
    assert [start['from'] for start in starts] == [0, 2]


def test_training_is_the_same_with_and_without(tmp_path):
    options = dict(max_iters=4, val_interval=2)
    one = build(tmp_path / 'a', hooks=hooks(validate_first=True), **options)
    one.train()
    other = build(tmp_path / 'b', hooks=[dict(type=EMATeacherHook)], **options)
    other.train()
    assert one.model.seen == other.model.seen
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_failure_is_loud_and_training_goes_on(tmp_path, monkeypatch):
    runner = build(tmp_path, max_iters=4, interval=2, hooks=hooks())
    said = []
    monkeypatch.setattr(runner.logger, 'error', said.append)

    def broken(folder):
        raise ZeroDivisionError('the page is broken')

    monkeypatch.setattr(report, 'make_report', broken)
    runner.train()
    assert runner.iter == 4
    hook = next(hook for hook in runner.hooks if isinstance(hook, ReportHook))
    assert hook.failures == 3  # two checkpoints and the end
    assert len(said) == 4
    assert all('Traceback' in text and 'the page is broken' in text for text in said[:3])
    assert 'could not be made 3 times' in said[3]
    assert not (tmp_path / 'report.html').exists()


def test_an_interrupt_is_no_failure_of_the_report(tmp_path, monkeypatch):
    def stopped(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, 'make_report', stopped)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, max_iters=2, interval=2, hooks=hooks()).train()


def test_the_last_of_all_hooks(tmp_path):
    class After(Hook):
        priority = 'VERY_LOW'

    runner = build(tmp_path, hooks=[*hooks(), dict(type=After)])
    assert isinstance(runner.hooks[-1], ReportHook)


def test_wrong_number():
    with pytest.raises(ValueError, match='max_regions must be at least 1, got 0'):
        ReportHook(max_regions=0)


# ----------------------------------------------------------------- held-out regions


class Run:
    """As much of a runner as a validation needs."""

    def __init__(self, work_dir, counters=()):
        self.work_dir, self.iter, self.timestamp = str(work_dir), 5, 'T'
        self.max_iters, self.cfg = 10, Config()
        self.model = nn.Module()
        self.model.predict_with = 'policy'
        self.said, self.images = [], []
        self.logger = SimpleNamespace(error=self.said.append, info=print)
        self.message_hub = SimpleNamespace(get_info=lambda key: None)
        self.visualizer = SimpleNamespace(add_image=lambda *args: self.images.append(args))
        self.hooks = list(counters)


def square(height, width, top, left, size=4):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top : top + size, left : left + size] = True
    return mask


def batch(names, paired=None):
    """Grey frames of 8 x 8 of images of 12 x 16; region 4 x 4, found 2 columns further right."""
    frames = [torch.full((3, 8, 8), 50 + 20 * i, dtype=torch.uint8) for i in range(len(names))]
    pair = None
    if paired is not None:
        second = torch.full((3, 8, 8), 250, dtype=torch.uint8)
        pair = {'index': torch.tensor([paired]), 'g_pixel_values': [second]}
    metas = [RegionMeta('set', name, 'a dog', None, 12, 16) for name in names]
    outputs = [
        {
            'caption': f'caption of {name}',
            'caption_return': None,
            'reference': 'a dog',
            'gt_mask': square(12, 16, 2, 4),
            'target_mask': square(12, 16, 2, 4),
            'masks': {'generated': square(12, 16, 2, 6), 'reference': square(12, 16, 2, 4)},
            'tracks': {},
        }
        for name in names
    ]
    return {'data': {'g_pixel_values': frames, 'pair': pair}, 'data_samples': metas}, outputs


def validate(run, hook, batches):
    hook.before_train(run)
    hook.before_val(run)
    for data, outputs in batches:
        hook.after_val_iter(run, 0, data, outputs)
    hook.after_val_epoch(run, {})
    assert run.said == []


def test_a_line_per_region_and_its_pictures(tmp_path):
    run = Run(tmp_path)
    validate(run, ReportHook(max_regions=2), [batch(['a', 'b'], paired=1), batch(['c'])])
    rows = lines(tmp_path / 'validations/iter_00000005.jsonl')
    assert [row['name'] for row in rows] == ['set/a', 'set/b', 'set/c']
    first = rows[0]
    assert first['iou'] == pytest.approx(8 / 24)  # 2 of 4 columns, 4 rows: 8 of 16 + 16 - 8
    assert first['own_iou'] == 1.0
    assert (first['caption'], first['reference']) == ('caption of a', 'a dog')
    assert first['weights'] == 'policy'
    assert 'found' not in rows[2]  # beyond max_regions: numbers and texts alone
    found = {**first['found'], 'counts': first['found']['counts'].encode()}
    assert (coco.decode(found).astype(bool) == square(12, 16, 2, 6).numpy()).all()
    with zipfile.ZipFile(tmp_path / 'validations/images.zip') as archive:
        assert set(archive.namelist()) == {
            *(first['image'], rows[1]['image'], rows[1]['target_image'])
        }
        second = report.pictures.decode_jpeg(archive.read(rows[1]['target_image']))
    assert second.shape == (12, 16, 3)  # the proportions of the mask, not of the square frame
    assert abs(second.astype(int) - 250).max() <= 3
    assert first['target_image'] == first['image']
    html = (tmp_path / 'report.html').read_text()
    assert 'caption of a' in html
    assert 'the first 2 of 3' in html


def test_a_clip_is_a_film_strip(tmp_path):
    data, outputs = batch(['a'])
    pixels = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (100, 150, 200)]
    data['data']['pair'] = {
        'index': torch.tensor([0]),
        'frame': torch.tensor([2]),
        'g_pixel_values': pixels[1:2],
    }
    data['data']['clip'] = {
        'index': torch.tensor([0, 0]),
        'frame': torch.tensor([1, 3]),
        'g_pixel_values': [pixels[0], pixels[2]],
    }
    there, shifted, nowhere = square(12, 16, 2, 4), square(12, 16, 2, 6), torch.zeros(12, 16) > 0
    outputs[0]['tracks'] = {
        'gt': [there, there, nowhere, nowhere],
        'generated': [there, shifted, nowhere, there],
        'reference': [there] * 4,
    }
    run = Run(tmp_path)
    validate(run, ReportHook(), [(data, outputs)])
    (row,) = lines(tmp_path / 'validations/iter_00000005.jsonl')
    # Found; 8 of 24 pixels; rightly nothing; wrongly something.
    assert row['iou'] == pytest.approx((1 + 8 / 24 + 1 + 0) / 4)
    clip = row['clip']
    assert [len(clip[key]) for key in ('images', 'target', 'found')] == [4, 4, 4]
    with zipfile.ZipFile(tmp_path / 'validations/images.zip') as archive:
        greys = [report.pictures.decode_jpeg(archive.read(name)) for name in clip['images']]
    assert [int(np.median(grey)) for grey in greys] == [50, 100, 150, 200]
    for key, track in (('target', 'gt'), ('found', 'generated')):
        kept = [report.pictures.decode_mask(mask) for mask in clip[key]]
        assert [mask.tolist() for mask in kept] == [x.tolist() for x in outputs[0]['tracks'][track]]
    # Asked, and the answer as a strip: four frames in two lines.
    ((_, picture, _),) = run.images
    assert picture.shape[1] == 16 + 4 + 320 + 4
    # Cells of 157 x 118 pixels with two of black around them, in the order of the clip.
    cells = [
        picture[top : top + 118, left : left + 157].astype(int)
        for top in (2, 122)
        for left in (22, 181)
    ]
    assert [int(cell[-5, 5, 0]) for cell in cells] == pytest.approx([50, 100, 150, 200], abs=3)
    blue = [cell[..., 2] - cell[..., 0] > 60 for cell in cells]
    # A mask of 4 x 4 of 12 x 16 pixels: found in all frames but the third, moved in the second. Its
    # border is where the true one's may be.
    assert [bool(cell.any()) for cell in blue] == [True, True, False, True]
    columns = [cell.any(0).nonzero()[0].mean() / 157 * 16 for cell in (blue[1], blue[3])]
    assert columns == pytest.approx([8, 6], abs=1.1)
    # The outline of the truth is in the first two frames alone.
    yellow = [(cell[..., 0] - cell[..., 2] > 60).any() for cell in cells]
    assert yellow == [True, True, False, False]
    html = (tmp_path / 'report.html').read_text()
    assert 'mean IoU of 4 frames 0.58' in html


def test_a_second_validation_keeps_the_pictures_and_adds_the_new(tmp_path):
    run, hook = Run(tmp_path), ReportHook()
    validate(run, hook, [batch(['a'])])
    run.iter = 9
    validate(run, hook, [batch(['a', 'z'])])
    with zipfile.ZipFile(tmp_path / 'validations/images.zip') as archive:
        assert len(archive.namelist()) == 2
        assert archive.testzip() is None
    assert len(lines(tmp_path / 'validations/iter_00000009.jsonl')) == 2
    assert 'jpeg' not in lines(tmp_path / 'validations/iter_00000009.jsonl')[0]


def test_examples_go_to_the_back_ends(tmp_path):
    run = Run(tmp_path)
    validate(run, ReportHook(), [batch(['a'])])
    ((name, picture, step),) = run.images
    assert (name, step) == ('examples/best_1', 5)
    assert picture.shape == (12, 2 * (16 + 4), 3)
    assert picture.dtype == np.uint8


def test_ranks_take_turns_and_no_region_counts_twice(tmp_path, monkeypatch):
    """Rank 0 has regions 0 and 2, rank 1 has 1 and, to fill up, 0 again."""

    def gather(value):
        if value and isinstance(value[0], dict):
            return [value, [{**value[0], 'name': 'set/1'}, {**value[0], 'name': 'set/0'}]]
        return [value, value]

    monkeypatch.setattr(module, 'all_gather_object', gather)
    run = Run(tmp_path)
    validate(run, ReportHook(), [batch(['0', '2'])])
    names = [row['name'] for row in lines(tmp_path / 'validations/iter_00000005.jsonl')]
    assert names == ['set/0', 'set/1', 'set/2']


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'is_main_process', lambda: False)
    run = Run(tmp_path)
    validate(run, ReportHook(), [batch(['a'])])
    assert list(tmp_path.iterdir()) == []


def test_skipped_records_of_all_ranks(tmp_path, monkeypatch):
    counter = BadRecordHook()
    counter.read = Counter({'set': 40})
    counter.bad = Counter({('set', 'empty mask'): 3})
    monkeypatch.setattr(module, 'all_gather_object', lambda value: [value, value])
    hook, run = ReportHook(), Run(tmp_path, [counter])
    hook.before_train(run)
    hook.after_train(run)
    (line,) = lines(tmp_path / 'report/progress.jsonl')
    assert line['read'] == {'set': 80}
    assert line['bad'] == [['set', 'empty mask', 6]]
    assert '7.5 %' in (tmp_path / 'report.html').read_text()


def test_validations_outside_of_training_leave_nothing(tmp_path):
    hook, run = ReportHook(), Run(tmp_path)
    hook.before_val(run)
    hook.after_val_iter(run, 0, *batch(['a']))
    hook.after_val_epoch(run, {})
    assert list(tmp_path.iterdir()) == []


def test_a_validation_without_the_cycle_has_no_regions(tmp_path):
    run = Run(tmp_path)
    validate(run, ReportHook(), [(None, [0.5]), (None, [{'answer': 'x'}]), (None, None)])
    assert not (tmp_path / 'validations').exists()


# ----------------------------------------------------------------- back ends


def visualizer(config, folder):
    # One instance a name, for the life of the process: the folder is no other test's.
    return VISUALIZERS.build({**config, 'save_dir': str(folder), 'name': str(folder)})


def test_tensorboard_gets_scalars_and_pictures(tmp_path, root):
    """By the visualizer of the configs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config.fromfile(root / 'configs/_base_/default_runtime.py').visualizer.to_dict()
    run = Run(tmp_path)
    run.visualizer = visualizer(config, tmp_path / 'log')
    run.visualizer.add_scalars({'loop1/reward_mean': 0.5, 'cycle/return_iou': 0.25}, step=5)
    validate(run, ReportHook(), [batch(['a'])])
    run.visualizer.close()
    events = EventAccumulator(str(tmp_path / 'log/vis_data')).Reload()
    assert [e.value for e in events.Scalars('loop1/reward_mean')] == [0.5]
    assert [(e.step, e.value) for e in events.Scalars('cycle/return_iou')] == [(5, 0.25)]
    (image,) = events.Images('examples/best_1')
    assert (image.step, image.height, image.width) == (5, 12, 40)


def wandb_history(file):
    """Values logged to a ``.wandb`` file, as far as it is written: LevelDB's log of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, message, values = file.read_bytes(), 7, b'', {}
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block is too short for a head
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack('<HB', data[position + 4 : position + 7])
        position += 7 + length
        if not kind or position > len(data):
            break
        message += data[position - length : position]
        if kind in (1, 4):  # whole, or the last part
            for item in Record.FromString(message).history.item:
                values['/'.join(item.nested_key) or item.key] = json.loads(item.value_json)
            message = b''
    return values


def test_wandb_offline_gets_scalars_and_pictures(tmp_path):
    if importlib.util.find_spec('wandb') is None:
        pytest.skip('wandb is in requirements-dev.txt')
    # In a process of its own: W&B leaves a thread in every process that is forked afterwards.
    codes, printed = ranks(_log_to_wandb, 1, tmp_path / 'logs', tmp_path)
    assert codes == [0], printed


def _log_to_wandb(rank, tmp_path):
    os.environ['WANDB_SILENT'] = 'true'
    run = Run(tmp_path)
    options = dict(project='test', mode='offline', dir=str(tmp_path))
    backend = dict(type='WandbVisBackend', init_kwargs=options)
    config = dict(type='Visualizer', vis_backends=[backend])
    run.visualizer = visualizer(config, tmp_path / 'log')
    run.visualizer.add_scalars({'loop1/reward_mean': 0.5}, step=5)
    validate(run, ReportHook(), [batch(['a'])])
    run.visualizer.close()
    # Another process of W&B's writes the file, and may still be at it, or not have begun.
    deadline = time.monotonic() + 60
    values = {}
    while not {'loop1/reward_mean', 'examples/best_1/path'} <= values.keys():
        assert time.monotonic() < deadline, f'W&B wrote {list(values)}'
        time.sleep(0.05)
        for file in tmp_path.rglob('offline-run-*/run-*.wandb'):
            values = wandb_history(file)
    assert values['loop1/reward_mean'] == 0.5
    with Image.open(file.parent / 'files' / values['examples/best_1/path']) as picture:
        assert picture.size == (40, 12)
