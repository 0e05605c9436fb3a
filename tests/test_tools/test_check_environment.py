"""The stacks fit each other and `pyproject.toml`; an environment that is none of them is named."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
STACKS = ('default', 'stock-xtuner', 'newest')


@pytest.fixture(scope='module')
def tool():
    path = ROOT / 'tools/check_environment.py'
    spec = importlib.util.spec_from_file_location('check_environment', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(tool, stack: str) -> dict[str, str]:
    """Exact versions of a stack, by name."""
    found = {}
    for requirement in tool.requirements(ROOT / f'constraints/{stack}.txt'):
        (pin,) = requirement.specifier
        assert pin.operator in ('==', '==='), requirement
        name = canonicalize_name(requirement.name)
        assert name not in found, f'{name} twice'
        found[name] = pin.version
    return found


def test_the_stacks_are_the_makefiles_and_differ_in_what_depends_on_them(tool):
    there = {path.stem for path in (ROOT / 'constraints').glob('*.txt')}
    assert there == {*STACKS, 'common'}
    text = (ROOT / 'Makefile').read_text()
    assert re.search(r'^STACKS := (.*)$', text, re.MULTILINE)[1].split() == list(STACKS)
    common = pins(tool, 'common')
    for stack in STACKS:
        own = pins(tool, stack)
        assert common.items() <= own.items()
        assert {'torch', 'torchvision', 'transformers', 'tokenizers', 'bitsandbytes'} <= set(own)
        assert not {'torch', 'transformers'} & set(common)
    assert (ROOT / 'requirements.txt').read_text().splitlines()[-1] == '-r constraints/default.txt'


def test_the_ranges_of_pyproject_hold_every_stack(tool):
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    declared = [*project['dependencies'], *project['optional-dependencies']['deepspeed']]
    for stack in STACKS:
        there = {**pins(tool, stack), 'sam2': '1.1.0'}
        for requirement in map(Requirement, declared):
            version = there[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), (stack, requirement, version)


def test_other_files_and_markers_are_read(tool, tmp_path):
    (tmp_path / 'a.txt').write_text(
        '# one\n-r sub/b.txt\n\ntorch===2.13.0  # why\nx==1; python_version < "3"\n'
    )
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub/b.txt').write_text('y==2\n')
    assert [str(r) for r in tool.requirements(tmp_path / 'a.txt')] == ['y==2', 'torch===2.13.0']


def test_versions_are_compared(tool, monkeypatch):
    def version(name):
        there = {'torch': '2.13.0+cpu', 'numpy': '2.0'}
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(tool.metadata, 'version', version)
    texts = ('numpy==2.0', 'numpy==2.1', 'torch==2.13.0', 'torch===2.13.0', 'nothing==1')
    assert list(tool.wrong_versions(map(Requirement, texts))) == [
        'numpy 2.0 is installed, the stack has numpy==2.1',
        'torch 2.13.0+cpu is installed, the stack has torch===2.13.0',
        'nothing is not installed, the stack has nothing==1',
    ]


def test_only_xtuners_metadata_are_excused(tool):
    said = """\
xtuner 0.2.0 requires tiktoken, which is not installed.
torchvision 0.28.0 has requirement torch==2.13.0, but you have torch 2.14.1.
xtuner 0.2.0 has requirement transformers==4.48.0, but you have transformers 4.57.6.
"""
    unfit, excused = tool.conflicts(said)
    assert unfit == said.splitlines()[1:2]
    assert excused == [said.splitlines()[0], said.splitlines()[2]]
    assert tool.conflicts('No broken requirements found.\n') == ([], [])


def test_an_import_that_fails_is_named_with_its_reason(tool, tmp_path, monkeypatch):
    (tmp_path / 'broken_module.py').write_text('raise RuntimeError("of no use\\nat all")\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert list(tool.failing_imports(['json', 'broken_module', 'nowhere'])) == [
        'import broken_module fails: RuntimeError: of no use',
        "import nowhere fails: ModuleNotFoundError: No module named 'nowhere'",
    ]


def test_another_environment_is_an_error_that_says_what_to_do(tool, tmp_path, capsys):
    (tmp_path / 'mine.txt').write_text('numpy==0.1\n')
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(tmp_path / 'mine.txt'), 'pytest==0.2'])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    for name, wanted in (('numpy', '0.1'), ('pytest', '0.2')):
        there = metadata.version(name)
        assert f'  {name} {there} is installed, the stack has {name}=={wanted}\n' in said
    assert said.splitlines()[-1].endswith('`make setup STACK=mine`')


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ['make', *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(tmp_path) -> Path:
    """What `make setup` looks at."""
    for name in ('Makefile', 'pyproject.toml', 'requirements-dev.txt'):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / 'constraints', tmp_path / 'constraints')
    return tmp_path


def test_a_stack_that_is_not_there_is_one_line_with_those_that_are(copy):
    done = make(copy, 'setup', 'STACK=newst')
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "there is no stack 'newst'; there are: default stock-xtuner newest" in line


def test_an_environment_keeps_its_stack(copy):
    named = re.compile(r'constraints/([\w-]+)\.txt: 6')
    assert named.findall(make(copy, '-n', 'lint').stdout) == ['default']
    (copy / '.venv').mkdir()
    (copy / '.venv/.stack-newest').touch()
    assert named.findall(make(copy, '-n', 'lint').stdout) == []
    (copy / 'constraints/newest.txt').touch()
    assert named.findall(make(copy, '-n', 'lint').stdout) == ['newest']
    changed = make(copy, '-n', 'setup', 'STACK=stock-xtuner').stdout
    assert named.findall(changed) == ['stock-xtuner']
    assert 'rm -r .venv' in changed


def test_xtuner_is_installed_where_it_works(copy):
    for stack, expected in (('default', 1), ('stock-xtuner', 0), ('newest', 0)):
        commands = make(copy, '-n', 'setup', f'STACK={stack}').stdout
        installs = [line for line in commands.splitlines() if '--ignore-requires-python' in line]
        assert len(installs) == 1
        assert 'sam2==1.1.0' in installs[0]
        assert ('xtuner==0.2.0' in installs[0]) == bool(expected)


def test_a_python_out_of_range_is_named(copy):
    done = make(copy, 'setup', 'PYTHON=')
    assert 'error: no Python 3.11 to 3.13 on PATH: make setup PYTHON=' in done.stderr
    old = copy / 'python'
    old.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 13, 0); $2"\n'
    )
    old.chmod(0o755)
    done = make(copy, 'setup', 'STACK=stock-xtuner', f'PYTHON={old}')
    assert 'is Python 3.13, the stack stock-xtuner needs 3.11 to 3.12: make setup' in done.stderr
    assert not (copy / '.venv').exists()
