"""500 hostile records: every one is trained on, or counted with a reason; nothing ends the run."""

from __future__ import annotations

import importlib.util
import math
import random
import re
import sys
from collections import Counter

import pytest
from hostile_data import SOURCES
from mmengine.hooks import Hook

from projects.llava_sam2_rl.hooks import ReportHook
from projects.llava_sam2_rl.registry import DATASETS, HOOKS

CONFIG = """\
from mmengine.config import read_base

with read_base():
    from .sa2va_tiny_dual_loop_sft import *

train_dataloader['dataset'] = dict(type='MixedRegionDataset', datasets=[{sources}])
train_dataloader.update(batch_size=10)
train_cfg.update(max_iters=50)
default_hooks['bad_records'].update(max_bad_fraction=1.0)
default_hooks['report'].update(validate_first=False)
val_dataloader['dataset'].update(length=2)
custom_hooks = [dict(type='SeenHook')]
"""


class SeenHook(Hook):
    """Remembers what the training was given."""

    def __init__(self):
        self.trained = Counter()
        self.skipped = Counter()
        self.finite = []
        SeenHook.last = self

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.trained.update(meta.name for meta in data_batch['data_samples'])
        self.skipped.update(f'{source}/{name}' for source, name, _ in data_batch['data']['skipped'])
        self.finite.append(math.isfinite(outputs['loss']))


def tool(root, name, argv):
    spec = importlib.util.spec_from_file_location(name, root / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.main(argv)


@pytest.fixture
def config(root, tmp_path, monkeypatch):
    draw = random.Random(15)
    sources = []
    for name, (write, count) in SOURCES.items():
        (tmp_path / name).mkdir()
        begun = write(tmp_path / name, count, draw)
        # Shorter than by default: a tenth of the time on a CPU.
        more = f'source={name!r}, max_caption_tokens=64, transforms=transform'
        sources.append(f'{begun}, {more})')
    (tmp_path / 'configs').symlink_to(root / 'configs')
    (tmp_path / 'mine').mkdir()
    for path in (root / 'configs').iterdir():
        (tmp_path / 'mine' / path.name).symlink_to(path)
    path = tmp_path / 'mine/hostile.py'
    path.write_text(CONFIG.format(sources=', '.join(sources)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ReportHook, '_write', lambda *_: None)
    HOOKS.register_module(name='SeenHook', module=SeenHook, force=True)
    yield str(path)
    del HOOKS.module_dict['SeenHook']


@pytest.mark.slow
def test_500_hostile_records_are_trained_on_or_counted(root, config, capsys):
    total = sum(count for _, count in SOURCES.values())
    assert total == 500
    # An epoch of the tool: it ends, and every record is readable or counted.
    command = [config, '--samples', '500', '--rows', '2', '--max-bad-fraction', '1']
    assert tool(root, 'verify_datasets', command) == 0
    text = capsys.readouterr().out
    reasons: Counter[str] = Counter()
    for name, number, _ in re.findall(r'^  (\w+): (\d+) x (\w+), e\.g\. \w+/.*: \3', text, re.M):
        reasons[name] += int(number)
    readable = {n: int(k) for n, k, _ in re.findall(r'^(\w+) +(\d+)/(\d+) ', text, re.M)}
    for name, (_, count) in SOURCES.items():
        assert readable[name] + reasons[name] == count, (name, text)
        assert readable[name] > 0.2 * count
    for kind in ('image_token', 'mask_token', 'chat_marker', 'control_character', 'cut_text'):
        assert f' x {kind}, e.g.' in text
    for reason in ('bad_encoding', 'long_caption', 'bad_json', 'bad_polygon', 'image_too_large'):
        assert f' x {reason}, e.g.' in text

    # An epoch of training: 50 steps of 10.
    tool(root, 'train', [config, '--work-dir', 'run'])
    seen = SeenHook.last
    assert len(seen.finite) == 50
    assert all(seen.finite)
    data = DATASETS.build(_sources(config))
    every = {
        f'{source.source}/{source._name(i).partition("/")[2]}'
        for source in data.datasets
        for i in range(source.num_records)
    }
    assert len(every) == 500
    assert set(seen.trained) | set(seen.skipped) == every
    assert sum(seen.trained.values()) == 500
    assert (set(seen.trained) & set(seen.skipped)) == set()


def _sources(path):
    from mmengine.config import Config

    from projects.llava_sam2_rl.engine.dataloader_config import complete_dataloader

    config = Config.fromfile(path)
    return complete_dataloader(config.train_dataloader, config).dataset
