from __future__ import annotations

import math

from mmengine.config import Config

from projects.llava_sam2_rl.report.config_diff import base_files, config_changes, diff, flatten


def test_flatten():
    nested = {'a': {'b': [{'c': 1}, {'c': 2}], 'd': [1, 2]}, 'e': None, 'f': {}}
    expected = {'a.b.0.c': 1, 'a.b.1.c': 2, 'a.d': [1, 2], 'e': None, 'f': {}}
    assert flatten(nested) == expected


def test_diff():
    old = {'a': 1, 'b': 2, 'c': 3, 'd': math.nan, 'work_dir': 'x'}
    assert diff(old, {'load_from_new': 'n\n', 'd': math.nan, 'c': 3, 'b': 3, 'a': True}) == [
        *('-a = 1', '+a = True', '-b = 2', '+b = 3', "+load_from_new = 'n\\n'")
    ]
    assert diff(old, dict(reversed(old.items()))) == []


def test_files_of_both_kinds(tmp_path):
    old = tmp_path / 'old.py'
    old.write_text("_base_ = ['base/a.py', 'mmdet::b.py']\nx = 1\n")
    assert base_files(old) == [tmp_path / 'base/a.py']
    new = tmp_path / 'configs/new.py'
    new.parent.mkdir()
    new.write_text(
        'from mmengine.config import read_base\n'
        'with read_base():\n    from ._base_.a import *\n    from ..other import *\n'
    )
    assert base_files(new) == [tmp_path / 'configs/_base_/a.py', tmp_path / 'other.py']


def test_a_config_with_a_base_and_a_command_line(tmp_path):
    (tmp_path / 'base.py').write_text('train_cfg = dict(max_iters=400, by_epoch=False)\nseed = 0\n')
    (tmp_path / 'mine.py').write_text(
        'from mmengine.config import read_base\n'
        'with read_base():\n    from .base import *\n'
        'train_cfg.update(max_iters=200)\nmodel = dict(beta=0.1)\n'
    )
    config = Config.fromfile(tmp_path / 'mine.py')
    config.merge_from_dict({'model.beta': 0.5, 'work_dir': '/somewhere'})
    assert config_changes(config) == {
        'file': ['+model.beta = 0.1', '-train_cfg.max_iters = 400', '+train_cfg.max_iters = 200'],
        'run': ['-model.beta = 0.1', '+model.beta = 0.5'],
    }


def test_a_config_of_this_project(root):
    config = Config.fromfile(root / 'configs/sa2va_tiny_dual_loop.py')
    config.merge_from_dict({'model.objective.beta': 0.5})
    changes = config_changes(config)
    (beta,) = (line for line in changes['file'] if line.startswith('+model.objective.beta = '))
    assert changes['run'] == [beta.replace('+', '-'), '+model.objective.beta = 0.5']
    assert not any('model.policy.type' in line for line in changes['file'])  # the base's
