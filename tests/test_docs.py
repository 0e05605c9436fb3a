"""The commands of docs/evaluation.md and docs/inference.md are run as they stand there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil

import pytest
import torch
from PIL import Image

from projects.llava_sam2_rl.datasets import GeneratedScenes
from projects.llava_sam2_rl.models.checkpoint import resolve

ROOT_NAMES = ('configs', 'tools', 'docs')
#: What a user has and the test has not: a large model, and a run of 400 steps.
MODEL = 'pretrained/Sa2VA-4B'
CHECKPOINT = 'work_dirs/sa2va_tiny_dual_loop_sft/iter_400.pth'


def blocks(root, page, language):
    text = (root / 'docs' / page).read_text()
    return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


def commands(root, page):
    """Commands without those that are marked as needing data."""
    found = []
    for block in blocks(root, page, 'bash'):
        if not block.startswith('# data'):
            found += block.replace('\\\n', ' ').strip().splitlines()
    return [shlex.split(command) for command in found]


@pytest.fixture
def place(root, tmp_path, monkeypatch, tiny_loop):
    """A folder where the paths of the pages lead somewhere."""
    for name in ROOT_NAMES:
        (tmp_path / name).symlink_to(root / name)
    shutil.copytree(resolve('llava_sam2_rl://assets/sa2va_tiny'), tmp_path / MODEL)
    scene = GeneratedScenes(length=1, split='val')[0]['sample']
    Image.fromarray(scene.image).save(tmp_path / 'photo.jpg', quality=95)
    Image.fromarray(scene.mask).save(tmp_path / 'mask.png')
    (tmp_path / CHECKPOINT).parent.mkdir(parents=True)
    tiny_loop.teacher.num_updates = 400
    state = {'meta': {}, 'state_dict': tiny_loop.state_dict()}
    torch.save({**state, 'teacher': tiny_loop.teacher.state_dict()}, tmp_path / CHECKPOINT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command):
    assert command[0] == 'python'
    spec = importlib.util.spec_from_file_location('command', command[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(command[2:])


def test_inference(root, place, capsys):
    for command in commands(root, 'inference.md'):
        assert not run(command)
    assert (place / 'found/photo_2_overlay.png').is_file()
    assert (place / 'exported_teacher/model.safetensors').is_file()
    assert (place / 'sa2va_4b.pth').is_file()
    (code,) = blocks(root, 'inference.md', 'python')
    assert len([line for line in code.splitlines() if line.strip()]) == 3
    capsys.readouterr()
    exec(compile(code, 'inference.md', 'exec'), {})
    assert capsys.readouterr().out.split()[-1].isdecimal()


def test_evaluation(root, place):
    few = ['test_dataloader.dataset.length=2']
    for command in commands(root, 'evaluation.md'):
        assert run([*command, '--cfg-options', *few])['referring/scenes/num_samples'] == 2
    written = {path.relative_to(place).as_posix() for path in place.glob('work_dirs/*/test_*.json')}
    assert written == {
        'work_dirs/base/test_policy.json',
        'work_dirs/trained/test_policy.json',
        'work_dirs/trained/test_teacher.json',
    }


def test_every_path_and_class_named_in_the_pages_is_there(root):
    import projects.llava_sam2_rl.evaluation as evaluation

    for page in ('evaluation.md', 'inference.md'):
        text = (root / 'docs' / page).read_text()
        for path in re.findall(r'(?:configs|tools)/[\w/]+\.py', text):
            assert (root / path).is_file(), path
        for name in re.findall(r'\w+(?:Metric|Loop)\b', text):
            assert hasattr(evaluation, name), name
