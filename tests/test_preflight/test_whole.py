"""All checks together: one list, exit status 2, and nothing started. Real processes."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import PATIENCE
from runs import skip_without_xtuner

from projects.llava_sam2_rl import preflight
from projects.llava_sam2_rl.preflight import Problem, check, report, require
from test_preflight.configs import BIG, ROOT, TINY, config

JUDGE = ROOT / 'configs/sa2va_4b_dual_loop_judge.py'


def test_the_tiny_config_starts(tmp_path):
    assert check(config(f'work_dir={tmp_path / "run"}'), ('train', 'test')) == []
    assert not (tmp_path / 'run').exists()


def test_everything_at_once_is_one_list(monkeypatch, capsys):
    """A first start of the 4B model on a laptop: no weights, no data, no GPU, no judge, two typos.

    Neither typo hides the rest, and none is told twice, as what the objective's class says of it.
    """
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    where = 'model.objective.caption_to_mask.reward.rewards.1'
    options = [
        'foo.bar=1',
        'model.objective.bta=1',
        f'{where}.api_key_env=NOT_SET',
        'preflight.skip=[memory,disk]',
    ]
    cfg = config(*options, file=JUDGE)
    with pytest.raises(SystemExit) as stop:
        require(cfg)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(f'6 problems in {JUDGE}, nothing was started:\n')
    for key in (
        'foo',
        'model.objective.bta',
        'model.policy.pretrained',
        'dataset_defaults.RefCOCODataset.data_root',
        'optim_wrapper.type',
        f'{where}.api_key_env',
    ):
        assert f'. {key}: ' in text
    assert text.count('     -> ') == 6


def test_the_4b_model_takes_seconds():
    """Of this process's own time: others may keep the machine busy."""
    started = time.process_time()
    assert check(config(file=BIG), ('train', 'test'))
    assert time.process_time() - started < 10


def test_remarks_do_not_stop_a_run(monkeypatch, capsys):
    monkeypatch.setattr(preflight, 'check', lambda *_: [Problem('a.b', 'slow', 'wait', False)])
    require(config())
    assert capsys.readouterr().err == '  note: a.b: slow\n     -> wait\n'


def test_of_the_processes_of_a_machine_the_first_tells_it_all(monkeypatch, capsys):
    monkeypatch.setattr(preflight, 'check', lambda *_: [Problem('a.b', 'wrong', 'mend it')])
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setenv('RANK', '5')
    with pytest.raises(SystemExit):
        require(config())
    assert capsys.readouterr().err == 'rank 5 does not start: a.b\n'


def test_a_check_is_left_out_by_its_name():
    cfg = config(file=BIG)
    keys = {problem.key for problem in check(cfg)}
    assert 'dataset_defaults.RefCOCODataset.data_root' in keys
    keys = {p.key for p in check(config('preflight.skip=[data,files]', file=BIG))}
    assert not keys & {'dataset_defaults.RefCOCODataset.data_root', 'model.policy.pretrained'}
    (problem,) = check(config('preflight.skip=dat'))
    assert (problem.key, problem.fix) == ('preflight.skip', f'one of {", ".join(preflight.CHECKS)}')


def test_configs_of_other_models_are_read_for_their_keys_alone(tmp_path):
    path = tmp_path / 'other.py'
    path.write_text('model = dict(type="torch.nn.Identity")\n')
    assert check(config(file=path)) == []


def test_report():
    problems = [Problem('b', 'slow', 'wait', False), Problem('a', 'wrong', 'mend it')]
    assert report(problems, 'x.py') == (
        '1 problem in x.py, nothing was started:\n'
        '  1. a: wrong\n     -> mend it\n'
        '  note: b: slow\n     -> wait'
    )


@pytest.fixture
def options(tmp_path):
    """A validation and a test whose pictures are not there, and a typo."""
    return [
        f'{loader}.{option}'
        for loader in ('val_dataloader.dataset', 'test_dataloader.dataset')
        for option in ('_delete_=True', 'type=Photographs', f'image_dir={tmp_path / "pictures"}')
    ] + ['train_cfg.max_iter=3']


def assert_refused(text, loader, tmp_path):
    assert '2 problems in' in text
    assert 'train_cfg.max_iter: DualLoopTrainLoop has no such option' in text
    assert f"{loader}.dataset.image_dir: there is no '{tmp_path / 'pictures'}'" in text


@pytest.mark.parametrize('tool', ['train', 'test', 'check'])
def test_nothing_is_started(tmp_path, tool, options, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location(tool, ROOT / f'tools/{tool}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv('LOCAL_RANK', '0')
    command = [str(TINY), '--work-dir', str(tmp_path / 'run'), '--cfg-options', *options]
    if tool == 'check':
        command = ['--for', 'train', *command]
    with pytest.raises(SystemExit) as stop:
        module.main(command)
    assert stop.value.code == 2
    loader = 'test_dataloader' if tool == 'test' else 'val_dataloader'
    assert_refused(capsys.readouterr().err, loader, tmp_path)
    assert not (tmp_path / 'run').exists()


def test_the_check_says_that_nothing_was_found(tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location('check', ROOT / 'tools/check.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv('LOCAL_RANK', '0')
    module.main([str(TINY), '--work-dir', str(tmp_path / 'run')])
    assert 'nothing was found that would stop the run (train, test)' in capsys.readouterr().out


@pytest.mark.slow  # xtuner's process is what takes the time
def test_xtuner_builds_no_model(tmp_path, options):
    """What `xtuner train` starts as its child, whose exit status it drops."""
    script = Path(skip_without_xtuner().__file__)
    command = [script, TINY, '--work-dir', tmp_path / 'run', '--cfg-options', *options]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert_refused(done.stderr, 'val_dataloader', tmp_path)
