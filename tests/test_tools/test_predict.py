"""tools/predict.py: captions on the terminal, masks and overlays as pictures."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from projects.llava_sam2_rl.datasets import GeneratedScenes

MODEL = 'llava_sam2_rl://assets/sa2va_tiny'


@pytest.fixture
def main(root):
    spec = importlib.util.spec_from_file_location('predict', root / 'tools/predict.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def scene(tmp_path):
    sample = GeneratedScenes(length=1, split='val')[0]['sample']
    Image.fromarray(sample.image).save(tmp_path / 'photo.png')
    Image.fromarray(sample.mask).save(tmp_path / 'mask.png')
    return sample


def test_mask_and_text(main, scene, tmp_path, capsys):
    code = main(
        [
            *(MODEL, str(tmp_path / 'photo.png'), '--mask', str(tmp_path / 'mask.png')),
            *('--text', scene.caption, scene.distractor, '--out', str(tmp_path / 'found')),
            *('--device', 'cpu'),
        ]
    )
    assert code == 0
    said = capsys.readouterr().out
    assert f'{tmp_path / "mask.png"}: a ' in said
    assert said.count('[SEG]') == 2
    with Image.open(tmp_path / 'found/photo_1.png') as picture:
        found = np.array(picture) > 0
    assert found.shape == scene.mask.shape
    assert (found & scene.mask).sum() / (found | scene.mask).sum() > 0.5
    with Image.open(tmp_path / 'found/photo_1_overlay.png') as picture:
        drawn = np.array(picture)
    assert drawn.shape == scene.image.shape
    assert (drawn[found] != scene.image[found]).any()
    assert (tmp_path / 'found/photo_2.png').is_file()


def test_one_bad_mask_does_not_stop_the_rest(main, scene, tmp_path, capsys):
    Image.fromarray(np.zeros_like(scene.mask)).save(tmp_path / 'empty.png')
    masks = [str(tmp_path / 'empty.png'), str(tmp_path / 'mask.png')]
    photo = str(tmp_path / 'photo.png')
    code = main([MODEL, photo, '--mask', *masks, '--text', '', '--out', str(tmp_path)])
    assert code == 1
    said = capsys.readouterr()
    assert 'empty.png: the mask is empty' in said.err
    assert "the text '' names nothing" in said.err
    assert 'mask.png: a ' in said.out


def test_nothing_asked_no_image_no_model(main, scene, tmp_path, capsys):
    photo = str(tmp_path / 'photo.png')
    for argv, message in (
        ([MODEL, photo], 'nothing asked'),
        ([MODEL, str(tmp_path / 'no.png'), '--text', 'x'], 'there is no image'),
        ([str(tmp_path / 'no'), photo, '--text', 'x'], 'no checkpoint folder'),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
