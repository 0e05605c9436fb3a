"""A run's config from the command line, against the one that `xtuner train` makes of it."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner
from runs import skip_without_xtuner

from projects.llava_sam2_rl.engine import entry
from projects.llava_sam2_rl.engine.deepspeed_config import read_deepspeed_config
from projects.llava_sam2_rl.engine.entry import build_runner, parse_options, training_config
from projects.llava_sam2_rl.utils.errors import CheckpointError

CONFIG = """
model = dict(type='Toy', width=3)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.1), accumulative_counts=2,
    clip_grad=dict(max_norm=0.5),
)
train_dataloader = dict(batch_size=4)
randomness = dict(seed=0, deterministic=False)
load_from = None
resume = False
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    path = tmp_path / 'small.py'
    path.write_text(CONFIG)
    torch.save({'meta': {'seed': 5}, 'state_dict': {}}, 'iter_2.pth')
    return path


def theirs(monkeypatch, arguments: list[str]) -> Config:
    """The config with which `xtuner train` builds its runner."""
    module = skip_without_xtuner()
    seen = []

    class Stop(Exception):
        pass

    def keep(config):
        seen.append(config)
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(sys, 'argv', ['train', *arguments])
        patched.setattr(Runner, 'from_cfg', keep)
        patched.setattr(module.RUNNERS, 'build', keep)
        with pytest.raises(Stop):
            module.main()
        os.environ.pop('LOCAL_RANK')
    return seen[0]


@pytest.mark.parametrize(
    ('arguments', 'given'),
    [
        ([], {}),
        (['--seed', '3', '--work-dir', 'w'], {'seed': 3, 'work_dir': 'w'}),
        (['--resume', 'iter_2.pth'], {'resume': 'iter_2.pth'}),
        (['--resume', 'iter_2.pth', '--seed', '3'], {'resume': 'iter_2.pth', 'seed': 3}),
        (['--launcher', 'pytorch'], {'launcher': 'pytorch'}),
        (['--cfg-options', 'model.width=4', 'work_dir=x', 'a=[1,2]', 'b=None'], {}),
        (['--cfg-options', 'optim_wrapper.accumulative_counts=8'], {'deepspeed': 'zero2.json'}),
        (['--resume', 'iter_2.pth'], {'deepspeed': 'zero2.json', 'resume': 'iter_2.pth'}),
    ],
)
def test_the_config_is_that_of_xtuner_train(file, root, monkeypatch, arguments, given):
    settings = None
    if 'deepspeed' in given:
        path = str(root / 'configs/deepspeed' / given['deepspeed'])
        arguments = ['--deepspeed', path, *arguments]
        settings = read_deepspeed_config(path)
    expected = theirs(monkeypatch, [str(file), *arguments]).to_dict()
    options = arguments[arguments.index('--cfg-options') :][1:] if 'cfg' in str(arguments) else []
    found = training_config(file, parse_options(options), **{**given, 'deepspeed': settings})
    found = found.to_dict()
    if settings is not None:
        # The classes differ, and xtuner's takes one option more, of its own.
        assert found['strategy'].pop('type').endswith('DualLoopDeepSpeedStrategy')
        assert expected['strategy'].pop('type').endswith('DeepSpeedStrategy')
        assert expected['strategy'].pop('sequence_parallel_size') == 1
    assert found == expected


def test_the_seed_of_a_checkpoint_comes_first(file, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(entry, 'print_log', lambda text, **_: said.append(text))
    assert training_config(file).randomness.seed == 0
    assert training_config(file, seed=3).randomness.seed == 3
    config = training_config(file, seed=3, resume='iter_2.pth')
    assert (config.randomness.seed, config.resume, config.load_from) == (5, True, 'iter_2.pth')
    assert '--seed 3 is not used: iter_2.pth goes on with its own, 5.' in said
    with pytest.raises(FileNotFoundError, match=r'there is no checkpoint iter_9\.pth'):
        training_config(file, resume='iter_9.pth')
    torch.save([1], 'iter_9.pth')
    with pytest.raises(CheckpointError, match='is not a checkpoint'):
        training_config(file, resume='iter_9.pth')


@pytest.mark.parametrize(
    ('line', 'accepted'),
    [
        ("framework = 'huggingface'", False),
        ('sequence_parallel_size = 2', False),
        ('use_varlen_attn = True', False),
        ("model_resource = dict(fn='x')", False),
        ('sequence_parallel_size = 1', True),
        ('use_varlen_attn = False', True),
    ],
)
def test_what_only_xtuner_does_is_refused(file, line, accepted):
    file.write_text(f'{CONFIG}\n{line}\n')
    if accepted:
        training_config(file)
    else:
        with pytest.raises(ValueError, match=f'the config has {line.split()[0]}=.*xtuner train'):
            training_config(file)


def test_the_runner_is_the_one_the_config_names(monkeypatch):
    built = []
    for runner in (Runner, FlexibleRunner):
        monkeypatch.setattr(runner, 'from_cfg', lambda config, name=runner: built.append(name))
    build_runner(Config({}))
    build_runner(Config({'runner_type': 'FlexibleRunner'}))
    assert built == [Runner, FlexibleRunner]
