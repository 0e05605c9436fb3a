"""ProfileHook: phases in the log of every run; a trace and a table on request."""

from __future__ import annotations

import gzip
import json

import pytest

from projects.llava_sam2_rl.hooks import EMATeacherHook, ProfileHook
from test_hooks.toy import build


def run(tmp_path, **options):
    runner = build(
        tmp_path, hooks=[{'type': EMATeacherHook}, {'type': ProfileHook, **options}], max_iters=6
    )
    runner.train()
    return runner


def test_every_run_logs_its_phases(tmp_path):
    runner = run(tmp_path)
    logged = runner.message_hub.log_scalars
    assert len(logged['train/time/backward'].data[0]) == 6
    assert min(logged['train/time/backward'].data[0]) > 0
    assert list(logged['train/time/data_wait'].data[0]) == list(logged['train/data_time'].data[0])
    assert not (tmp_path / 'profile').exists()
    # Nothing of it stays on the wrapper.
    assert 'backward' not in vars(runner.optim_wrapper)
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert all('time/backward' in row for row in rows)


@pytest.mark.parametrize(('steps', 'traced'), [(2, 2), (50, 4)])
def test_a_profile_is_written(tmp_path, steps, traced):
    run(tmp_path, steps=steps, start=2)
    with gzip.open(tmp_path / 'profile/trace_0.json.gz', 'rt') as file:
        events = json.load(file)['traceEvents']
    # `record_function` events of the phases lie between the operators.
    assert (
        sum(e.get('name') == 'backward' and e['cat'] == 'user_annotation' for e in events) == traced
    )
    assert any(e.get('name') == 'aten::addmm' for e in events)
    lines = (tmp_path / 'profile/phases_0.md').read_text().splitlines()
    (row,) = [line.split('|') for line in lines if line.startswith('| backward ')]
    assert row[4].strip() == '1'
    assert float(row[5]) > 50  # the process itself, in MiB


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match='got -1 and 3'):
        ProfileHook(steps=-1)
