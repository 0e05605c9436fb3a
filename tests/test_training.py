"""Training with the tiny configs as users start it: real processes, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import PATIENCE
from mmengine.config import Config
from runs import skip_without_xtuner

SMALL = [
    'train_cfg.max_iters=6',
    'train_dataloader.batch_size=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
    'val_dataloader.dataset.length=4',
]


LAUNCHER = Path(__file__).resolve().parents[1] / 'tools/train.py'


def command(config: Path, work_dir: Path, *more: str, options: list[str] = SMALL) -> list[str]:
    args = [sys.executable, str(LAUNCHER), str(config), '--work-dir', str(work_dir)]
    return [*args, *more, '--cfg-options', *options]


def environment() -> dict[str, str]:
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}


def run(args: list[str], cwd: Path, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        args,
        cwd=cwd,
        env={**environment(), **more},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def scalars(work_dir: Path) -> dict[int, dict]:
    """Logged training numbers by step, the latest entry of each."""
    rows = {}
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if 'loss' in row:
                rows[row['step']] = row
    return rows


@pytest.fixture(scope='module')
def config(root) -> Path:
    return root / 'configs/sa2va_tiny_dual_loop_sft.py'


@pytest.fixture(scope='module')
def uninterrupted(config, tmp_path_factory) -> Path:
    # Not the repository: a config has to work from anywhere.
    folder = tmp_path_factory.mktemp('uninterrupted')
    result = run(command(config, folder / 'run'), folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / 'run'


def final(work_dir: Path) -> dict:
    return torch.load(work_dir / 'iter_6.pth', map_location='cpu', weights_only=False)


def assert_same(a: dict, b: dict) -> None:
    assert a['state_dict'].keys() == b['state_dict'].keys()
    for key, value in a['state_dict'].items():
        assert torch.equal(value, b['state_dict'][key]), key
    shadows = a['teacher']['shadows'], b['teacher']['shadows']
    assert a['teacher']['num_updates'] == b['teacher']['num_updates'] == 6
    assert shadows[0].keys() == shadows[1].keys()
    assert all(torch.equal(shadows[0][key], shadows[1][key]) for key in shadows[0])
    for index, state in a['optimizer']['state'].items():
        for name, value in state.items():
            assert torch.equal(value, b['optimizer']['state'][index][name]), (index, name)


@pytest.mark.slow
def test_a_run_leaves_its_log_curves_and_checkpoints(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {'iter_2.pth', 'iter_4.pth', 'iter_6.pth', 'last_checkpoint'} <= names
    rows = scalars(uninterrupted)
    assert sorted(rows) == [1, 2, 3, 4, 5, 6]
    keys = {'loop1/loss', 'loop2/loss', 'total_loss', 'lr', 'loop1/mask_bce', 'teacher/updates'}
    assert keys <= set(rows[1])
    row = rows[3]
    assert row['total_loss'] == pytest.approx(row['loop1/loss'] + row['loop2/loss'], rel=1e-5)
    assert row['loss'] == pytest.approx(row['total_loss'], rel=1e-5)
    checkpoint = final(uninterrupted)
    assert {key.split('.')[0] for key in checkpoint['state_dict']} == {'policy'}
    moved = [
        (checkpoint['teacher']['shadows'][name] - checkpoint['state_dict'][f'policy.{name}'])
        .abs()
        .max()
        for name in checkpoint['teacher']['shadows']
    ]
    assert max(moved) > 0  # the teacher lags behind


@pytest.mark.slow
def test_xtuner_train_ends_with_the_same_bits(uninterrupted, config, tmp_path):
    """By the module, since its command line hides a failure; resumed, so that the seed is read."""
    skip_without_xtuner()
    args = [sys.executable, '-m', 'xtuner.tools.train', str(config)]
    args += ['--work-dir', str(tmp_path / 'run'), '--seed', '7']
    args += ['--resume', str(uninterrupted / 'iter_4.pth'), '--cfg-options', *SMALL]
    result = run(args, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same(final(tmp_path / 'run'), final(uninterrupted))


KILL = """
import os, signal
from mmengine.hooks import Hook


class KillHook(Hook):
    def before_save_checkpoint(self, runner, checkpoint):
        self.saved = True

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            assert self.saved
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(uninterrupted, config, tmp_path):
    work_dir = tmp_path / 'run'
    # By itself, since another process cannot tell in time where this one is. The kernel does not
    # care who sends a SIGKILL.
    (tmp_path / 'kill.py').write_text(KILL)
    killed = Config.fromfile(config)
    killed.custom_hooks = [*killed.get('custom_hooks', []), {'type': 'kill.KillHook'}]
    killed.dump(tmp_path / 'killed.py')
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    result = run(command(tmp_path / 'killed.py', work_dir), tmp_path, PYTHONPATH=path)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    last = Path((work_dir / 'last_checkpoint').read_text())
    assert last.name == 'iter_2.pth'
    result = run(command(config, work_dir, '--resume', str(last)), tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same(final(work_dir), final(uninterrupted))
    expected, rows = scalars(uninterrupted), scalars(work_dir)
    for step, row in expected.items():
        for key in ('loss', 'loop1/loss', 'loop2/loss', 'grad_norm', 'lr'):
            assert rows[step][key] == row[key], (step, key)


@pytest.mark.slow
def test_resume_from_a_damaged_or_foreign_checkpoint_says_so(uninterrupted, config, tmp_path):
    damaged = tmp_path / 'iter_4.pth'
    damaged.write_bytes((uninterrupted / 'iter_4.pth').read_bytes()[:20000])
    args = command(config, tmp_path / 'run', '--resume', str(damaged))
    result = run(args, tmp_path)
    assert result.returncode != 0
    assert str(damaged) in result.stderr.splitlines()[-1]
    assert 'damaged' in result.stderr.splitlines()[-1]

    checkpoint = torch.load(uninterrupted / 'iter_4.pth', map_location='cpu', weights_only=False)
    state = checkpoint['state_dict']
    state['backbone.conv1.weight'] = state.pop(next(iter(state)))
    torch.save(checkpoint, damaged)
    result = run(args, tmp_path)
    assert result.returncode != 0
    assert 'backbone.conv1.weight' in result.stderr
    assert not list((tmp_path / 'run').glob('iter_*'))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('model.objective.caption_wieght=2', "did you mean 'caption_weight'"),
        ('model.teecher.decay=0.9', "did you mean 'teacher'"),
        ('modle.objective.caption_weight=2', "did you mean 'model'"),
        ('model.objective.type=SFTObjectve', "did you mean 'SFTObjective'"),
        ('model.policy.pretrained=nowhere', "no checkpoint folder 'nowhere'"),
    ],
)
def test_a_typo_in_the_config_is_named_with_the_nearest_key(config, tmp_path, option, message):
    result = run(command(config, tmp_path / 'run', options=[*SMALL, option]), tmp_path)
    assert result.returncode != 0
    assert message in result.stderr.replace('"', "'")
    assert not (tmp_path / 'run/iter_2.pth').exists()
