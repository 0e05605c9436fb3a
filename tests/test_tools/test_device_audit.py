"""tools/device_audit.py: what would crash or wait on a GPU, on a machine without one.

The numbers are budgets: a change that makes the host wait for the GPU more often fails here. The
line that does is shown by ``python tools/device_audit.py SCENARIO``.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

#: Times that the host may wait in each phase of a step, B = 2, G = 8; 0 where none is named.
BUDGETS = {
    'sft': {
        'backward': 7, 'decode': 83, 'encode': 4, 'exchange': 10, 'forward': 29, 'optimizer': 1,
        'other': 9, 'prefill': 1, 'rollout': 11,
    },
    'gumbel': {
        'backward': 10, 'decode': 131, 'encode': 4, 'exchange': 10, 'forward': 53, 'optimizer': 1,
        'other': 9, 'prefill': 1, 'rollout': 21,
    },
    'grpo': {
        'backward': 5, 'decode': 246, 'encode': 4, 'exchange': 23, 'forward': 4, 'log_probs': 32,
        'optimizer': 1, 'other': 9, 'prefill': 2, 'return_trip': 153, 'rewards': 48, 'rollout': 83,
    },
    'sampling': {'decode': 481, 'prefill': 1, 'other': 2},
    'greedy': {'decode': 201, 'prefill': 1, 'other': 2},
    'validation': {'decode': 166, 'encode': 4, 'other': 67, 'prefill': 2},
    'inference': {'decode': 166, 'other': 37, 'prefill': 2},
    'resume': {'optimizer': 367},
}  # fmt: skip


@pytest.fixture(scope='module')
def counted(root, tmp_path_factory):
    """What one process counted in all scenarios: the pretended device stays in its process."""
    sys.path.insert(0, str(root / 'tools'))
    try:
        from devices import pretend_gpu
    finally:
        sys.path.remove(str(root / 'tools'))
    if lacking := pretend_gpu.missing():
        pytest.skip(f'the pretended GPU cannot be compiled: {lacking}')
    file = tmp_path_factory.mktemp('audit') / 'counted.json'
    command = [sys.executable, root / 'tools/device_audit.py', *BUDGETS, '--json', file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(file.read_text(encoding='utf-8'))


@pytest.mark.slow
@pytest.mark.parametrize('name', BUDGETS)
def test_no_devices_are_mixed(counted, name):
    assert counted[name]['problems'] == []
    assert sum(counted[name]['operations'].values()) > 1000  # it ran on the device at all


@pytest.mark.slow
@pytest.mark.parametrize('name', BUDGETS)
def test_the_host_waits_no_more_often_than_its_budget(counted, name):
    found, budget = counted[name]['waits'], BUDGETS[name]
    if name == 'resume':  # all else of it is files and what the steps of the others do
        found = {'optimizer': found['optimizer']}
    assert {phase: n for phase, n in found.items() if n > budget.get(phase, 0)} == {}
