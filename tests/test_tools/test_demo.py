"""`make demo`, shortened: the numbers, the pictures, the model, and a failure that is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from projects.llava_sam2_rl.models import VideoLLaVASAMModel


def run(root: Path, work_dir: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            *(sys.executable, str(root / 'tools/demo.py'), '--work-dir', str(work_dir)),
            *('--regions', '6', '--cfg-options', 'train_cfg.max_iters=2', *options),
        ],
        cwd=root,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.slow
def test_demo_leaves_numbers_pictures_and_a_model(root, tmp_path):
    result = run(root, tmp_path / 'demo', 'train_dataloader.batch_size=2')
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / 'demo/summary.json').read_text())
    for world, when in product(('collages', 'scenes'), ('before', 'after')):
        numbers = summary[world][when]
        keys = {'return_iou', 'meteor', 'caption_reward', 'own_iou', 'other_iou'}
        assert keys <= set(numbers)
        assert numbers['listening_gap'] == pytest.approx(
            numbers['own_iou'] - numbers['other_iou'], abs=1e-5
        )
    assert summary['regions'] == 6
    assert summary['seconds']['training'] <= summary['seconds']['all']
    for name in ('collages.png', 'scenes.png', 'photographs.png'):
        with Image.open(tmp_path / 'demo' / name) as picture:
            assert min(picture.size) > 300
    VideoLLaVASAMModel.from_pretrained(tmp_path / 'demo/model')
    for shown in ('collages.png', 'summary.json', 'Next', 'before', 'after'):
        assert shown in result.stdout


@pytest.mark.slow
def test_demo_fails_when_the_training_fails(root, tmp_path):
    result = run(root, tmp_path / 'demo', 'model.objective.num_generation=4')
    assert result.returncode != 0
    assert "did you mean 'num_generations'" in result.stderr
    assert 'training failed' in result.stderr
    assert not (tmp_path / 'demo/summary.json').exists()
