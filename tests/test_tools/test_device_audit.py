"""tools/device_audit.py: what would crash or wait on a GPU, on a machine without one.

The numbers are budgets: a change that makes the host wait for the GPU more often fails here. The
line that does is shown by ``python tools/device_audit.py SCENARIO``.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

#: Times that the host may wait in each phase of a step, G = 8; 0 where none is named.
GRPO = {
    'decode': 3, 'encode': 3, 'exchange': 1, 'forward': 2, 'log_probs': 9, 'optimizer': 1,
    'prefill': 2, 'return_trip': 21, 'rewards': 1, 'rollout': 12,
}  # fmt: skip
BUDGETS = {
    'sft': {
        'backward': 3, 'decode': 1, 'encode': 3, 'exchange': 1, 'forward': 18, 'optimizer': 1,
        'prefill': 1, 'rollout': 7,
    },
    'gumbel': {
        'backward': 2, 'decode': 2, 'encode': 3, 'exchange': 1, 'forward': 31, 'optimizer': 1,
        'prefill': 1, 'rollout': 12,
    },
    'grpo': GRPO,
    'grpo-b4': GRPO,  # their number does not grow with the batch
    'sampling': {'decode': 5, 'prefill': 1, 'other': 2},  # 33 tokens: once in eight, and the last
    'greedy': {'decode': 5, 'prefill': 1, 'other': 2},
    'validation': {'decode': 2, 'encode': 3, 'other': 29, 'prefill': 2},
    'inference': {'decode': 2, 'other': 39, 'prefill': 2},
    'resume': {'optimizer': 1},
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
