from __future__ import annotations

import importlib.util
import json

import pytest


@pytest.fixture(scope='module')
def main(root):
    spec = importlib.util.spec_from_file_location('report_tool', root / 'tools/report.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def run(tmp_path):
    file = tmp_path / 'run/20260101_000000/vis_data/scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({'loss': 0.125, 'iter': 10, 'step': 10}) + '\n')
    return tmp_path / 'run'


def test_a_run_without_the_hook(main, run, capsys):
    assert main([str(run)]) == 0
    # DeepSpeed speaks on stdout where it is imported first.
    assert capsys.readouterr().out.splitlines()[-1] == str(run / 'report.html')
    html = (run / 'report.html').read_text()
    assert 'loss, step 10: 0.125' in html
    assert 'the run had no' in html


def test_elsewhere(main, run, tmp_path):
    assert main([str(run), '--out', str(tmp_path / 'shown/page.html')]) == 0
    assert (tmp_path / 'shown/page.html').is_file()
    assert not (run / 'report.html').exists()


@pytest.mark.parametrize(
    ('name', 'message'), [('none', 'there is no folder'), ('.', 'no work directory of a run')]
)
def test_no_run(main, tmp_path, capsys, name, message):
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path / name)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_page_that_describes_it(root, main, run, tmp_path, monkeypatch):
    """Its commands run, and its config lines are config lines."""
    import re

    from mmengine.config import Config

    text = (root / 'docs/report.md').read_text()
    (command, _) = re.findall(r'```bash\n(.*?)```', text, re.DOTALL)
    place = tmp_path / 'work_dirs/sa2va_tiny_dual_loop'
    place.parent.mkdir()
    run.rename(place)
    monkeypatch.chdir(tmp_path)
    assert command.split()[:2] == ['python', 'tools/report.py']
    assert main(command.split()[2:]) == 0
    assert (place / 'report.html').is_file()
    config = tmp_path / 'mine.py'
    base = 'with read_base():\n    from .default_runtime import *\n'
    lines = '\n'.join(re.findall(r'```python\n(.*?)```', text, re.DOTALL))
    config.write_text(f'from mmengine.config import read_base\n{base}{lines}')
    (tmp_path / 'default_runtime.py').write_text(
        (root / 'configs/_base_/default_runtime.py').read_text()
    )
    made = Config.fromfile(config).to_dict()
    assert made['default_hooks']['report']['type'].endswith('.ReportHook')
    assert made['default_hooks']['report']['validate_first'] is True
    assert made['visualizer']['vis_backends'][-1]['init_kwargs']['mode'] == 'offline'
