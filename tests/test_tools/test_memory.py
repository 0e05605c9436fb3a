import importlib.util
import re
import subprocess
import sys

import pytest


@pytest.fixture(scope='module')
def tool(root):
    path = root / 'tools/memory.py'
    spec = importlib.util.spec_from_file_location('memory', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['memory'] = module
    spec.loader.exec_module(module)
    return module


def test_real_steps_are_compared_with_the_prediction(root):
    # A process of its own: memory that other tests leave behind would be counted.
    command = [sys.executable, 'tools/memory.py', 'configs/sa2va_tiny_dual_loop.py', '--measure']
    sizes = ['--batch', '1', '--group', '2', '--tokens', '4']
    done = subprocess.run([*command, *sizes], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for phase in ('encode', 'decode', 'optimizer'):
        assert f'  {phase} ' in done.stdout
    measured = float(re.search(r'^measured (\S+) GB', done.stdout, re.M)[1])
    assert 0 < measured < 2
