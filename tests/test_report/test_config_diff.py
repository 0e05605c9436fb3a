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


def test_a_config_of_this_project(root):
    config = Config.fromfile(root / 'configs/sa2va_tiny_dual_loop.py')
    config.merge_from_dict({'model.objective.beta': 0.5, 'work_dir': '/somewhere'})
    changes = config_changes(config)
    # From _base_/schedules/tiny.py, and what the config makes of it.
    assert {'-train_cfg.max_iters = 400', '+train_cfg.max_iters = 200'} < set(changes['file'])
    (beta,) = (line for line in changes['file'] if line.startswith('+model.objective.beta = '))
    assert changes['run'] == [beta.replace('+', '-'), '+model.objective.beta = 0.5']
    assert not any('model.policy.type' in line for line in changes['file'])  # the base's
