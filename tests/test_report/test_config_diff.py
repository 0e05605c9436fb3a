from __future__ import annotations

from mmengine.config import Config

from projects.llava_sam2_rl.report.config_diff import base_files, config_rows, diff, flatten


def test_flatten():
    nested = {'a': {'b': [{'c': 1}, {'c': 2}], 'd': [1, 2]}, 'e': None, 'f': {}}
    expected = {'a.b.0.c': 1, 'a.b.1.c': 2, 'a.d': [1, 2], 'e': None, 'f': {}}
    assert flatten(nested) == expected


def test_diff():
    rows = diff({'a': 1, 'b': 2, 'work_dir': 'x'}, {'a': 1, 'b': 3}, {'a': True, 'b': 3, 'c': 'n'})
    assert rows == [
        {'key': 'a', 'base': '1', 'file': '1', 'run': 'True'},
        {'key': 'b', 'base': '2', 'file': '3', 'run': '3'},
        {'key': 'c', 'base': None, 'file': None, 'run': "'n'"},
    ]


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
    rows = {row['key']: row for row in config_rows(config)}
    # From _base_/schedules/tiny.py, and what the config makes of it.
    assert rows['train_cfg.max_iters'] == {
        'key': 'train_cfg.max_iters',
        'base': '400',
        'file': '200',
        'run': '200',
    }
    beta = rows['model.objective.beta']
    assert (beta['base'], beta['run']) == (None, '0.5')
    assert beta['file'] not in (None, '0.5')
    assert 'work_dir' not in rows
    assert 'model.policy.type' not in rows  # the same in all three
