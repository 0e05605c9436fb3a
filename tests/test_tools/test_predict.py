"""tools/predict.py: captions on the terminal, masks and overlays as pictures."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
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
    said, noted = capsys.readouterr()
    assert 'note: this tiny model knows generated shapes and the six objects' in noted
    assert f'{tmp_path / "mask.png"}: a ' in said
    assert said.count('[SEG]') == 2
    assert '<|end|>' not in said
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


def test_boxes_points_and_scribbles(main, scene, tmp_path, capsys):
    """Each is a region, with what SAM 2 made of it as a picture."""
    height, width = scene.mask.shape
    rows, columns = scene.mask.nonzero()
    x, y = columns.mean(), rows.mean()
    code = main(
        [
            *(MODEL, str(tmp_path / 'photo.png'), '--device', 'cpu', '--out', str(tmp_path)),
            *('--box', f'0,0,{width},{height}', f'1,1,{width - 1},{height - 1}'),
            *('--point', f'{x},{y}', '1,1,0', '--point', f'{x},{y}'),
            *('--scribble', f'{x - 3},{y}', f'{x + 3},{y}'),
            *('--batch-size', '2'),
        ]
    )
    said = capsys.readouterr().out
    assert code == 0
    names = ('box_1', 'box_2', 'point_1', 'point_2', 'scribble_1')
    lines = said.splitlines()
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        assert f'photo_{name}.png' in line
        assert ': a ' in line
        with Image.open(tmp_path / f'photo_{name}.png') as picture:
            assert picture.size == (width, height)
        assert (tmp_path / f'photo_{name}_overlay.png').is_file()
    assert f'point {x:g},{y:g} 1,1,0 (' in lines[2]


def test_what_is_no_box_or_point(main, scene, tmp_path, capsys):
    photo = str(tmp_path / 'photo.png')
    for option, value, message in (
        ('--box', '1,2,3', "'1,2,3' is not LEFT,TOP,RIGHT,BOTTOM in pixels"),
        ('--point', 'here', "'here' is not X,Y in pixels, or X,Y,0"),
        ('--point', '1,2,3', "'1,2,3': the third number is 0 or 1"),
        ('--scribble', '1', "'1' is not X,Y in pixels"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([MODEL, photo, option, value])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    height, width = scene.mask.shape
    argv = [MODEL, photo, '--box', '5,5,9999,50', '--mask', str(tmp_path / 'mask.png')]
    assert main([*argv, '--out', str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert 'box 5,5,9999,50: Box(left=5.0' in said.err
    assert f'beyond the photograph, which is {width} x {height} pixels' in said.err
    assert 'mask.png: a ' in said.out


def test_an_answer_with_several_objects(main, scene, tmp_path, capsys, monkeypatch):
    from projects.llava_sam2_rl.models import VideoLLaVASAMModel

    def answer(self, data, *args, **options):
        text = '<p> a cup </p> [SEG] and [SEG].<|end|>'
        return torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)])

    monkeypatch.setattr(VideoLLaVASAMModel, 'generate', answer)
    argv = [MODEL, str(tmp_path / 'photo.png'), '--text', 'cups', '--out', str(tmp_path)]
    assert main([*argv, '--device', 'cpu']) == 0
    said = capsys.readouterr().out
    assert f'  object 1 (a cup): {tmp_path / "photo_1_object_1.png"}' in said
    assert f'  object 2: {tmp_path / "photo_1_object_2.png"}' in said
    parts = []
    for name in ('1', '1_object_1', '1_object_2'):
        with Image.open(tmp_path / f'photo_{name}.png') as picture:
            parts.append(np.array(picture) > 0)
    assert np.array_equal(parts[0], parts[1] | parts[2])
