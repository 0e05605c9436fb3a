import importlib.util
import subprocess
import sys
from logging import Logger
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from runs import skip_without_xtuner

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def launcher():
    spec = importlib.util.spec_from_file_location('launcher', ROOT / 'tools' / 'train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def started(monkeypatch):
    """What a training is given, instead of the training."""
    from projects.llava_sam2_rl.engine import entry

    seen = []

    def keep(file, options, **given):
        seen.append(SimpleNamespace(config=file, cfg_options=options, **given))
        return Config({})

    monkeypatch.setattr(entry, 'training_config', keep)
    monkeypatch.setattr(
        entry, 'build_runner', lambda _: SimpleNamespace(train=lambda: None, logger=Logger('x'))
    )
    return seen


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'small.py'
    path.write_text('model = dict(width=3)\n')
    return path


def test_every_argument_reaches_the_training(launcher, started, config):
    launcher.main(
        [
            '--cfg-options', 'model.width=4', 'a=[1,2]', '--work-dir', 'w', '--seed', '3',
            '--deepspeed', 'deepspeed_zero2', '--launcher', 'none', '--', str(config),
        ]
    )  # fmt: skip
    (args,) = started
    assert args.config == str(config)
    assert args.cfg_options == {'model.width': 4, 'a': [1, 2]}
    assert (args.work_dir, args.seed, args.launcher) == ('w', 3, 'none')
    assert args.deepspeed['zero_optimization']['stage'] == 2
    assert args.resume is None


def test_takes_every_option_of_xtuner(launcher, monkeypatch):
    import argparse

    xtuner_train = skip_without_xtuner()
    parsers = []

    class Stop(Exception):
        pass

    def keep(parser, *_):
        parsers.append(parser)
        raise Stop

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', keep)
    with pytest.raises(Stop):
        xtuner_train.parse_args()
    theirs = {option for action in parsers[0]._actions for option in action.option_strings}
    ours = {o for action in launcher.build_parser()._actions for o in action.option_strings}
    assert theirs <= ours


def fails(launcher, argv, capsys):
    with pytest.raises(SystemExit) as error:
        launcher.main(argv)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert text.count('\n') == 1
    return text


def test_a_config_that_is_not_there(launcher, started, config, capsys):
    text = fails(launcher, [str(config.with_name('smal.py'))], capsys)
    assert f'did you mean {config}?' in text
    assert started == []


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'iter_2.pth'
    torch.save({'meta': {}, 'state_dict': {}}, path)
    return path


def test_resume_a_path(launcher, started, config, checkpoint):
    launcher.main([str(config), '--resume', str(checkpoint)])
    assert started[0].resume == str(checkpoint)


@pytest.mark.parametrize('given', ['option', 'override', 'config', 'name'])
def test_resume_auto(launcher, started, config, checkpoint, given):
    argv = [str(config), '--resume', 'auto']
    work_dir = 'elsewhere'
    if given == 'option':
        argv += ['--work-dir', work_dir]
    elif given == 'override':
        argv += ['--cfg-options', 'model.width=1', f'work_dir={work_dir}']
    elif given == 'config':
        config.write_text(f'work_dir = {work_dir!r}\n')
    else:
        work_dir = 'work_dirs/small'
    Path(work_dir).mkdir(parents=True)
    (Path(work_dir) / 'last_checkpoint').write_text(str(checkpoint))
    launcher.main(argv)
    assert started[0].resume == str(checkpoint)


def test_resume_auto_with_nothing_there_starts_anew(launcher, started, config, capsys):
    launcher.main([str(config), '--resume', 'auto'])
    assert started[0].resume is None
    assert 'starting from the beginning' in capsys.readouterr().out


def test_a_checkpoint_that_is_not_there(launcher, started, config, capsys):
    text = fails(launcher, [str(config), '--resume', 'iter_9.pth'], capsys)
    assert 'there is no checkpoint iter_9.pth' in text
    assert started == []


def test_a_damaged_checkpoint(launcher, started, config, checkpoint, capsys):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    text = fails(launcher, [str(config), '--resume', str(checkpoint)], capsys)
    assert f'{checkpoint} is damaged' in text
    assert started == []


def test_a_checkpoint_of_deepspeeds_own_is_refused(launcher, started, config, tmp_path, capsys):
    folder = tmp_path / 'iter_4.pth'
    folder.mkdir()
    assert f'{folder} is a folder' in fails(
        launcher, [str(config), '--resume', str(folder)], capsys
    )
    assert started == []


def test_a_deepspeed_config_that_is_not_there(launcher, started, config, tmp_path, capsys):
    text = fails(launcher, [str(config), '--deepspeed', 'deepspeed_zero5'], capsys)
    assert 'there is no DeepSpeed config deepspeed_zero5: did you mean deepspeed_zero' in text
    (tmp_path / 'broken.json').write_text('{')
    text = fails(launcher, [str(config), '--deepspeed', 'broken.json'], capsys)
    assert 'broken.json is not JSON' in text
    (tmp_path / 'list.json').write_text('[]')
    text = fails(launcher, [str(config), '--deepspeed', 'list.json'], capsys)
    assert 'list.json holds a list' in text
    assert started == []


def test_an_option_without_a_value_is_named(launcher, started, config, capsys):
    text = fails(launcher, [str(config), '--cfg-options', 'model.width'], capsys)
    assert "--cfg-options takes KEY=VALUE, got 'model.width'" in text
    assert started == []


def test_a_failed_training_is_an_error_of_the_launcher(launcher, config):
    # The config has no model type; the error is not swallowed, so Python exits with 1.
    with pytest.raises(KeyError, match='must contain the key "type"'):
        launcher.main([str(config)])


def test_help_needs_no_framework():
    code = (
        'import runpy, sys; sys.argv = ["train.py", "--help"]\n'
        f'try: runpy.run_path({str(ROOT / "tools" / "train.py")!r}, run_name="__main__")\n'
        'except SystemExit: pass\n'
        'assert "torch" not in sys.modules and "xtuner" not in sys.modules\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '--resume PATH|auto' in done.stdout
    assert 'model.objective.beta=0.05' in done.stdout
