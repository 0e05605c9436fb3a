"""The disk is full in the middle of a checkpoint: the run stops, and its last one is whole."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest
from mmengine.hooks import Hook

from projects.llava_sam2_rl.engine.checkpoint_files import load_from_local
from projects.llava_sam2_rl.hooks import EMATeacherHook
from test_hooks import toy
from test_hooks.processes import ranks


class Fill(Hook):
    """Before the second checkpoint: leaves room for less than one."""

    priority = 'LOWEST'  # the last before the file is written

    def __init__(self, filler):
        self.filler = filler

    def before_save_checkpoint(self, runner, checkpoint):
        if runner.iter == 3:
            fill(Path(self.filler))


def fill(path):
    with open(path, 'wb', buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    os.truncate(path, path.stat().st_size - 8192)


class Limit(Hook):
    """Before the second checkpoint: no file may grow beyond half of one (a quota)."""

    def before_save_checkpoint(self, runner, checkpoint):
        if runner.iter == 3:
            half = (Path(runner.work_dir) / 'iter_2.pth').stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, resource.RLIM_INFINITY))


def _train(rank, work_dir, hook):
    toy.build(work_dir, hooks=[{'type': EMATeacherHook}, hook]).train()


def _resume(rank, work_dir):
    toy.build(work_dir, hooks=[{'type': EMATeacherHook}], resume=True).train()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / 'disk'
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f'no file system can be mounted here: {mounted.stderr.strip()}')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)


def check(tmp_path, work_dir, hook, reason, make_room):
    codes, printed = ranks(_train, 1, tmp_path / 'logs', work_dir, hook)
    assert codes == [1], printed
    first = work_dir / 'iter_2.pth'
    assert f'could not write {work_dir}/iter_4.pth' in printed[0]
    assert f'iter_4.pth was not written ({reason}), and the run stops' in printed[0]
    assert f'The last whole checkpoint: {first}. Free some space' in printed[0]
    # Neither half a file nor a claim that there is one.
    assert sorted(p.name for p in work_dir.glob('iter_*')) == ['iter_2.pth']
    assert (work_dir / 'last_checkpoint').read_text() == str(first)
    assert load_from_local(first)['meta']['iter'] == 2

    make_room()
    codes, printed = ranks(_resume, 1, tmp_path / 'logs', work_dir)
    assert codes == [0], printed
    assert load_from_local(work_dir / 'iter_6.pth')['meta']['iter'] == 6


def test_a_full_file_system(tmp_path, small_disk):
    filler = small_disk / 'filler'
    hook = {'type': Fill, 'filler': str(filler)}
    check(tmp_path, small_disk / 'run', hook, 'No space left on device', filler.unlink)


def test_a_file_that_may_not_grow(tmp_path):
    check(tmp_path, tmp_path / 'run', {'type': Limit}, 'File too large', lambda: None)
