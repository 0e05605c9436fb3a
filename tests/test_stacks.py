"""Checkpoints and exported folders written on one stack, read on another.

The other stacks are those that lie beside this one, in ``.venv`` and ``.venv-<stack>``, as
``make test-stacks`` makes them. Each has its own Python, torch and transformers, so each side is a
process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import PATIENCE
from runs import assert_same, assert_same_checkpoint, load, training

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/sa2va_tiny_dual_loop_sft.py'
OPTIONS = [
    'train_cfg.max_iters=3',
    'train_dataloader.batch_size=1',
    'train_dataloader.num_workers=0',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
    'val_dataloader.dataset.length=1',
]
# Resumes as any run does, and writes what it then holds in place of the first step.
HOLD = """
import os, runpy, sys
from mmengine.runner import Runner

original = Runner.call_hook

def call_hook(self, name, **arguments):
    if name == 'before_train_iter':
        self.train_loop._iter -= 1  # a step saves before it is counted
        self.save_checkpoint(os.path.dirname(held), os.path.basename(held), by_epoch=False)
        os._exit(0)
    original(self, name, **arguments)

Runner.call_hook = call_hook
held = sys.argv.pop(1)
runpy.run_path('tools/train.py', run_name='__main__')
"""
# A number of each tensor's bits: two processes can compare them.
DIGESTS = """
import hashlib, sys
from projects.llava_sam2_rl.models import VideoLLaVASAMModel

model = VideoLLaVASAMModel.from_pretrained(sys.argv[1])
for name, tensor in sorted(model.state_dict().items()):
    print(name, tensor.dtype, hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest())
"""


def other_stacks() -> list[Path]:
    """The Python of each stack beside the one that runs this."""
    stamps = sorted(ROOT.glob('.venv*/.stack-*'))
    folders = {stamp.name.removeprefix('.stack-'): stamp.parent for stamp in stamps}
    here = Path(sys.prefix).resolve()
    return [folder / 'bin/python' for folder in folders.values() if folder.resolve() != here]


def run(python: Path | str, *args: str | Path) -> str:
    result = subprocess.run(
        [str(python), *map(str, args)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, f'{args}:\n{result.stderr[-3000:]}'
    return result.stdout


def train(python: Path | str, work_dir: Path, *more: str | Path) -> Path:
    """The checkpoint after two of three steps."""
    arguments = [CONFIG, '--work-dir', work_dir, *more, '--cfg-options', *OPTIONS]
    run(python, ROOT / 'tools/train.py', *arguments)
    return work_dir / 'iter_2.pth'


@pytest.fixture(scope='module', params=other_stacks() or [None], ids=str)
def other(request) -> Path:
    if request.param is None:
        pytest.skip('no other stack beside this one: make test-stacks makes them')
    return request.param


@pytest.fixture(scope='module', params=['from here', 'from there'])
def written(request, other, tmp_path_factory) -> tuple[Path | str, Path, Path | str]:
    """Who wrote a checkpoint, the checkpoint, and who is to read it."""
    writer, reader = sys.executable, other
    if request.param == 'from there':
        writer, reader = reader, writer
    return writer, train(writer, tmp_path_factory.mktemp('written')), reader


@pytest.mark.slow
def test_a_run_goes_on_from_the_same_bits(written, tmp_path):
    _, checkpoint, reader = written
    held = tmp_path / 'held.pth'
    arguments = [CONFIG, '--work-dir', tmp_path / 'held', '--resume', checkpoint]
    run(reader, '-c', HOLD, held, *arguments, '--cfg-options', *OPTIONS)
    # Random streams differ between versions of torch; later ones know options of AdamW more.
    assert_same_checkpoint(checkpoint, held, ('state_dict', 'teacher'))
    saved, read = load(checkpoint)['optimizer'], load(held)['optimizer']
    assert_same(saved['state'], read['state'], 'state')
    for before, after in zip(saved['param_groups'], read['param_groups'], strict=True):
        common = before.keys() & after.keys()
        assert {'lr', 'betas', 'weight_decay', 'params'} <= common
        assert {key: before[key] for key in common} == {key: after[key] for key in common}
    train(reader, tmp_path / 'on', '--resume', checkpoint)
    assert list(training(tmp_path / 'on')) == [3]


@pytest.mark.slow
def test_an_exported_folder_holds_the_same_weights(written, tmp_path):
    writer, checkpoint, reader = written
    folder = tmp_path / 'exported'
    run(writer, ROOT / 'tools/convert_to_hf.py', CONFIG, checkpoint, folder)
    there, here = (run(python, '-c', DIGESTS, folder) for python in (writer, reader))
    assert len(there.splitlines()) > 300
    assert there == here
