"""The two converters as commands."""

from __future__ import annotations

import importlib.util

import psutil
import pytest
import torch
from safetensors.torch import load_file

from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.utils.pretrained import resolve

BASE = resolve('llava_sam2_rl://assets/sa2va_tiny')


def load(root, name):
    spec = importlib.util.spec_from_file_location(name, root / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    with torch.no_grad():
        tiny_model.policy.mlp1[1].weight.add_(1)
    path = tmp_path / 'iter_1.pth'
    state = {'meta': {}, 'state_dict': tiny_model.state_dict()}
    torch.save({**state, 'teacher': tiny_model.teacher.state_dict()}, path)
    return path


def test_convert_to_hf(root, checkpoint, tmp_path, capsys):
    main = load(root, 'convert_to_hf').main
    config = str(root / 'configs/sa2va_tiny_dual_loop_sft.py')
    main([config, str(checkpoint), str(tmp_path / 'policy'), '--dtype', 'bfloat16'])
    said = capsys.readouterr().out
    assert 'policy, sa2va_chat:' in said
    assert 'GB bfloat16' in said
    main([config, str(checkpoint), str(tmp_path / 'teacher'), '--weights', 'teacher'])
    key = 'mlp1.1.weight'
    base = load_file(BASE / 'model.safetensors')[key].float()
    policy = load_file(tmp_path / 'policy/model.safetensors')[key]
    teacher = load_file(tmp_path / 'teacher/model.safetensors')[key]
    assert torch.equal(policy, (base + 1).bfloat16())
    assert torch.equal(teacher, base)
    VideoLLaVASAMModel.from_pretrained(tmp_path / 'policy')


def test_without_room_it_says_so_in_one_line(root, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: type('Full', (), {'available': 4096}))
    config = str(root / 'configs/sa2va_tiny_dual_loop_sft.py')
    with pytest.raises(SystemExit) as stopped:
        load(root, 'convert_to_hf').main([config, str(checkpoint), str(tmp_path / 'out')])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'error: the export has the whole model in memory and takes about' in line
    assert not (tmp_path / 'out').exists()


def test_cfg_options_reach_the_model(root, checkpoint, tmp_path, capsys):
    main = load(root, 'convert_to_hf').main
    config = str(root / 'configs/sa2va_tiny_dual_loop_sft.py')
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                *(config, str(checkpoint), str(tmp_path / 'out')),
                *('--cfg-options', 'model.policy.lora.r=4'),
            ]
        )
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert 'checkpoint of another model' in said
    assert 'the model has (4, ' in said
    assert said.count('\n') == 1


def test_convert_from_hf(root, tmp_path, capsys):
    main = load(root, 'convert_from_hf').main
    main([str(BASE), str(tmp_path / 'model.pth')])
    state = torch.load(tmp_path / 'model.pth', weights_only=True)['state_dict']
    assert f'{len(state)} tensors' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / 'nowhere'), str(tmp_path / 'x.pth')])
    assert stopped.value.code == 2
    assert 'no checkpoint folder' in capsys.readouterr().err


@pytest.mark.parametrize(
    'name', ['convert_to_hf', 'convert_from_hf', 'predict', 'test', 'dlc_bench']
)
def test_help_shows_an_example(root, name, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(root, name).main(['--help'])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert f'python tools/{name}.py' in said
