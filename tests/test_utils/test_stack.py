"""Untested versions and bad mixtures are refused before anything fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from projects.llava_sam2_rl.utils import stack
from projects.llava_sam2_rl.utils.errors import StackError
from projects.llava_sam2_rl.utils.stack import OVERRIDE, check_versions

#: The default set.
GOOD = {
    'python': '3.12.4',
    'torch': '2.13.0+cu130',
    'torchvision': '0.28.0+cu130',
    'torchvision wants torch': '==2.13.0',
    'transformers': '4.57.6',
    'bitsandbytes': '0.49.2',
}


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(OVERRIDE, raising=False)


def refusal(**changes: str) -> str:
    with pytest.raises(StackError) as error:
        check_versions({**GOOD, **changes})
    text = str(error.value)
    assert '\n' not in text
    assert OVERRIDE in text
    return text


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'python': '3.11.0'},
        {'python': '3.13.9'},
        {'transformers': '4.48.0'},
        {'transformers': '5.24.9'},
        {'transformers': '5.0.0rc1'},
        {'torch': '2.14.2', 'torchvision wants torch': '>=2.14.0'},
        {'torch': '2.5.1', 'torchvision wants torch': '==2.5.1', 'bitsandbytes': '0.45.0'},
        {'torch': '2.6.0a0+ecf3bae40a.nv25.01', 'torchvision wants torch': ''},
    ],
)
def test_what_is_tested_passes(changes):
    check_versions({**GOOD, **changes})


def test_what_is_not_installed_is_left_to_its_import():
    check_versions({'python': '3.11.7'})


@pytest.mark.parametrize(
    ('name', 'version', 'tested', 'fix'),
    [
        ('transformers', '4.47.1', '4.48.0 to 5.24', 'pip install "transformers>=4.48.0,<5.25"'),
        ('transformers', '5.25.0', '4.48.0 to 5.24', 'pip install "transformers>=4.48.0,<5.25"'),
        ('torch', '2.5.0', '2.5.1 to 2.14', 'pip install "torch>=2.5.1,<2.15"'),
        ('torch', '2.15.0+cpu', '2.5.1 to 2.14', 'pip install "torch>=2.5.1,<2.15"'),
        ('torch', '3.0.0', '2.5.1 to 2.14', 'pip install "torch>=2.5.1,<2.15"'),
        ('python', '3.10.14', '3.11 to 3.13', 'make the environment'),
        ('python', '3.14.0', '3.11 to 3.13', 'make the environment'),
    ],
)
def test_outside_of_the_range(name, version, tested, fix):
    text = refusal(**{name: version})
    assert f'{name} {version} is outside' in text
    assert tested in text
    assert fix in text


def test_torchvision_of_another_torch():
    text = refusal(torch='2.9.1+cu126')
    assert 'torchvision 0.28.0+cu130 is made for torch==2.13.0' in text
    assert 'torch 2.9.1+cu126: pip install --upgrade torch==2.9.1 torchvision' in text
    refusal(torch='2.13.0', **{'torchvision wants torch': '>=2.14.0'})


@pytest.mark.parametrize(
    ('changes', 'both', 'fix'),
    [
        (
            {'bitsandbytes': '0.45.0'},
            ('bitsandbytes 0.45.0', 'torch 2.13.0+cu130'),
            'pip install "bitsandbytes>=0.49.2"',
        ),
        (
            {'transformers': '5.24.0', 'torch': '2.5.1', 'torchvision wants torch': '==2.5.1'},
            ('torch 2.5.1', 'transformers 5.24.0'),
            'pip install "torch>=2.6.0"',
        ),
    ],
)
def test_too_old_beside_another(changes, both, fix):
    text = refusal(**changes)
    assert all(name in text for name in both)
    assert fix in text


@pytest.mark.parametrize('value', ['0', '', 'true'])
def test_only_a_one_overrides(monkeypatch, value):
    monkeypatch.setenv(OVERRIDE, value)
    refusal(transformers='5.25.0')


def test_the_override_warns(monkeypatch):
    monkeypatch.setenv(OVERRIDE, '1')
    with pytest.warns(UserWarning, match=r'transformers 5\.25\.0 is outside .*\(goes on'):
        check_versions({**GOOD, 'transformers': '5.25.0'})


def test_versions_are_those_of_the_metadata(monkeypatch):
    """As of torchvision 0.20.1 and 0.29.1."""
    versions = {'torch': '2.5.1', 'torchvision': '0.20.1'}

    def version(name: str) -> str:
        if name not in versions:
            raise stack.metadata.PackageNotFoundError(name)
        return versions[name]

    needs = ['numpy', 'torch (==2.5.1)', "scipy ; extra == 'scipy'"]
    monkeypatch.setattr(stack.metadata, 'version', version)
    monkeypatch.setattr(stack.metadata, 'requires', lambda name: needs)
    monkeypatch.setattr(stack.platform, 'python_version', lambda: '3.11.7')
    found = stack.installed_versions()
    assert found == {'python': '3.11.7', **versions, 'torchvision wants torch': '==2.5.1'}
    needs[1] = 'torch>=2.14.0'
    assert stack.installed_versions()['torchvision wants torch'] == '>=2.14.0'


def test_this_stack_passes():
    check_versions()


def test_the_models_are_refused_before_anything_heavy_is_imported(root, tmp_path):
    """With the metadata of a version that does not exist first on the path."""
    info = tmp_path / 'transformers-9.0.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 9.0.0\n')
    code = (
        f'import sys; sys.path[:0] = [{str(root)!r}, {str(tmp_path)!r}]\n'
        'try:\n'
        '    import projects.llava_sam2_rl.models\n'
        'except RuntimeError as error:\n'
        "    heavy = {'torch', 'torchvision', 'transformers', 'peft', 'bitsandbytes', 'xtuner'}\n"
        '    print(sorted(heavy & set(sys.modules)), error)\n'
    )
    run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.startswith('[] transformers 9.0.0 is outside of the tested range')
