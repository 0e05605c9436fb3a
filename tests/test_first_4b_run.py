"""Every command of docs/first_4b_run.md, on its own paths, with the tiny model where 4B belongs.

Fewer iterations and samples, and two ranks for eight. `make setup` is what CI begins with.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmengine.config.config
import mmengine.optim
import numpy as np
import pytest
import torch
from distributed import run_ranks, train
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from PIL import Image
from pycocotools import mask as coco_mask
from runs import evaluation, training
from test_docs import MODEL, commands, place, run  # noqa: F401

from projects.llava_sam2_rl.datasets import GeneratedScenes
from projects.llava_sam2_rl.utils.pretrained import resolve

PAGE = 'first_4b_run.md'
SHORTER = {'max_iters=200': 'max_iters=2', 'max_iters=300': 'max_iters=3', '_300.pth': '_3.pth'}
SHORTER |= {f'{name}=100': f'{name}=1' for name in ('val_interval', 'checkpoint.interval')}
SHORTER |= {'rollouts.interval=20': 'rollouts.interval=1'}
SHORTER |= {f'{name}=8': f'{name}=2' for name in ('train_dataloader.batch_size', 'generations')}
SMALL = [
    'model.max_new_tokens=4',
    'optim_wrapper.accumulative_counts=1',
    'train_dataloader.num_workers=1',
    'val_dataloader.num_workers=1',
    'default_hooks.logger.interval=1',
]
RUNS = ('first_24gb', 'first', 'first_80gb', 'first_8gpu')


class BFloat16OnAnyDevice(OptimWrapper):
    """mmengine's `AmpOptimWrapper` asks for a GPU when it is built."""

    def __init__(self, dtype: str, loss_scale: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        assert dtype == 'bfloat16'
        assert not loss_scale['enabled']

    @contextlib.contextmanager
    def optim_context(self, model: Any) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


@pytest.fixture
def refcoco(place):  # noqa: F811
    """RefCOCO where the page puts it: ten generated scenes."""
    root = place / 'data/refer_seg'
    (root / 'refcoco').mkdir(parents=True)
    (root / 'images/train2014').mkdir(parents=True)
    scenes = GeneratedScenes(length=10, split='val')
    images, annotations, refs = [], [], []
    for i in range(10):
        scene = scenes[i]['sample']
        name = f'COCO_train2014_{i:012d}.jpg'
        Image.fromarray(scene.image).save(root / 'images/train2014' / name, quality=95)
        height, width = scene.mask.shape
        images.append({'id': i, 'file_name': name, 'height': height, 'width': width})
        code = coco_mask.encode(np.asfortranarray(scene.mask.astype(np.uint8)))
        annotations.append(
            {
                'id': 100 + i,
                'image_id': i,
                'category_id': 1,
                'segmentation': {'size': code['size'], 'counts': code['counts'].decode()},
            }
        )
        refs.append(
            {
                'ref_id': i,
                'ann_id': 100 + i,
                'image_id': i,
                'category_id': 1,
                'split': ('train', 'train', 'val', 'testA', 'testB')[i % 5],
                'file_name': name,
                'sentences': [{'sent_id': i, 'sent': scene.caption, 'raw': scene.caption}],
            }
        )
    instances = {
        'images': images,
        'annotations': annotations,
        'categories': [{'id': 1, 'name': 'a'}],
    }
    (root / 'refcoco/instances.json').write_text(json.dumps(instances))
    (root / 'refcoco/refs(unc).p').write_bytes(pickle.dumps(refs, protocol=2))
    return place


def download(command: list[str]) -> None:
    """`hf` takes the arguments; what it would fetch is there instead."""
    asked = subprocess.run(
        [str(Path(sys.executable).with_name('hf')), *command[1:]],
        env={**os.environ, 'HF_HUB_OFFLINE': '1'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 1, asked.stderr  # 2: it knows no such argument
    folder = command[command.index('--local-dir') + 1]
    assert folder == MODEL
    shutil.copytree(resolve('llava_sam2_rl://assets/sa2va_tiny'), folder)


def small(command: list[str]) -> list[str]:
    """The command, on less."""
    for old, new in SHORTER.items():
        command = [re.sub(rf'{re.escape(old)}$', new, word) for word in command]
    if 'tools/train.py' in command:
        command = [*command, *SMALL]
    if 'tools/test.py' in command:
        command = [*command, 'test_dataloader.num_workers=1']
    return command


def launch(command: list[str], root: Path) -> None:
    """What `torchrun` would start, with two ranks for the page's eight."""
    assert command[1:4] == ['--standalone', '--nproc_per_node', '8']
    assert command[4] == 'tools/train.py'
    run_ranks(train, 2, Path('logs').absolute(), root, command[5:])


# Five trainings, one of them on two ranks, and two tests.
@pytest.mark.slow
def test_every_command(root, refcoco, monkeypatch, capsys):
    monkeypatch.setattr(mmengine.optim, 'AmpOptimWrapper', BFloat16OnAnyDevice)
    # Half of a short run's time would go into laying out the config for people.
    monkeypatch.setattr(mmengine.config.config, 'FormatCode', lambda code, **_: (code, True))
    shutil.rmtree(refcoco / MODEL)
    done = []
    for command in commands(root, PAGE):
        done.append(command[1] if command[0] == 'python' else command[0])
        command = small(command)
        if command[0] == 'hf':
            download(command)
        elif command[0] == 'torchrun':
            launch(command, root)
        elif command[1] == 'tools/app.py':
            # It is run for that page.
            assert command in commands(root, 'inference.md')
            assert all(Path(folder, 'model.safetensors').is_file() for folder in command[2:])
        elif command[1] == 'tools/memory.py':
            assert not run(command)
            assert 'B 1, G 4, 128 tokens' in capsys.readouterr().out
        elif command[1] == 'tools/test.py':
            assert run(command)['referring/refcoco_val/num_samples'] == 2
        else:
            assert not run(command)
    assert done == [
        *('hf', 'tools/verify_datasets.py', 'tools/memory.py'),
        *('tools/train.py', 'tools/train.py', 'tools/train.py', 'torchrun'),
        *('tools/report.py', 'tools/train.py', 'tools/test.py', 'tools/test.py'),
        *('tools/convert_to_hf.py', 'tools/predict.py', 'tools/app.py'),
    ]
    for name in RUNS:
        folder = Path('work_dirs', name)
        last = 3 if name == 'first' else 2
        assert (folder / 'last_checkpoint').read_text().endswith(f'iter_{last}.pth')
        assert (folder / 'report.html').is_file()
        assert len(list((folder / 'rollouts').glob('*.png'))) == last
        assert sorted(training(folder)) == list(range(1, last + 1))
        assert sorted(evaluation(folder)) == list(range(last + 1))
    assert Path('work_dirs/data/01_refcoco.png').is_file()
    assert Path('work_dirs/found/photo_1_overlay.png').is_file()
    for name in ('first_base', 'first_test'):
        assert Path('work_dirs', name, 'test_policy.json').is_file()


def test_what_the_page_says_it_prints(root):
    """Its names of log lines are those that the code writes."""
    text = (root / 'docs' / PAGE).read_text()
    sources = '\n'.join(
        path.read_text() for path in (root / 'projects/llava_sam2_rl').rglob('*.py')
    )
    assert 'Validating before the first step, for the report' in text
    for line in ('Validating before the first step, for the report', 'bad records: none'):
        assert line in text
        assert line in sources, line


def test_the_memory_of_the_table_is_what_the_tool_predicts(root, monkeypatch, capsys):
    """Of the published sizes, which are part of the package."""
    monkeypatch.chdir(root)
    table = re.findall(
        r'^\| [^|]*GB[^|]* \| (\d+) \| (\d+) \| ([^|]*) \| ([\d.]+) GB \| (\d+) \|',
        (root / 'docs' / PAGE).read_text(),
        re.MULTILINE,
    )
    assert len(table) == 4
    config = Config.fromfile('configs/sa2va_4b_dual_loop.py')
    for batch, group, how, predicted, samples in table:
        ranks = ['--gpus', '8', '--zero', '2'] if how == 'ZeRO-2' else []
        command = ['python', 'tools/memory.py', 'configs/sa2va_4b_dual_loop.py', *ranks]
        assert not run([*command, '--batch', batch, '--group', group])
        (found,) = re.findall(r'in all +([\d.]+) GB', capsys.readouterr().out)
        assert f'{float(found):.1f}' == predicted
        gpus = 8 if ranks else 1
        assert int(samples) == int(batch) * gpus * config.optim_wrapper.accumulative_counts
