"""Phases: time is counted once, by the innermost phase."""

from __future__ import annotations

import time

import pytest

from projects.llava_sam2_rl.engine.timing import Phases, Spent, table


@pytest.fixture
def clock(monkeypatch):
    """Says what it is told."""
    now = [100.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    return now


def test_an_inner_phase_pauses_the_outer(clock):
    phases = Phases()
    clock[0] += 7  # outside of every phase
    with phases.phase('outer'):
        clock[0] += 1
        with phases.phase('inner'):
            clock[0] += 10
        clock[0] += 2
        with phases.phase('inner'):
            clock[0] += 20
    clock[0] += 5
    spent = phases.take()
    assert {name: (value.seconds, value.calls) for name, value in spent.items()} == {
        'outer': (3.0, 1),
        'inner': (30.0, 2),
    }
    assert phases.take() == {}


def test_a_phase_inside_itself_counts_once(clock):
    phases = Phases()
    with phases.phase('encode'), phases.phase('encode'):
        clock[0] += 4
    assert phases.take()['encode'].seconds == 4


def test_an_error_ends_the_phase(clock):
    phases = Phases()

    def fail():
        with phases.phase('decode'):
            clock[0] += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock[0] += 50
    assert phases.take()['decode'].seconds == 2


def test_taking_inside_a_phase_keeps_what_comes_after(clock):
    phases = Phases()
    with phases.phase('forward'):
        clock[0] += 1
        assert phases.take()['forward'].seconds == 1
        clock[0] += 2
    assert phases.take()['forward'].seconds == 2


def test_what_was_hidden_is_no_part_of_the_step(clock):
    phases = Phases()
    with phases.phase('rewards'):
        clock[0] += 4
        phases.hide('rewards', 2.5)
    phases.hide('rewards', 0.5)
    spent = phases.take()
    assert spent['rewards'].seconds == 4
    assert (spent['rewards_hidden'].seconds, spent['rewards_hidden'].calls) == (3.0, 2)
    *_, shown, hidden = table(spent, iterations=2).splitlines()
    assert shown == '| rewards | 2.0000 | 100.0% | 0.5 |  |'
    assert hidden == '| rewards_hidden | 1.5000 |  | 1 |  |'


def test_the_device_is_waited_for_and_memory_read_only_when_asked(clock):
    phases = Phases()
    with phases.phase('encode'):
        pass
    assert phases.take()['encode'].peak_bytes == 0
    sizes = iter([5, 9, 3])

    def wait():
        clock[0] += 1  # the work that was still under way

    phases.synchronize, phases.memory = wait, lambda: next(sizes)
    for _ in range(3):
        with phases.phase('encode'):
            pass
    spent = phases.take()['encode']
    assert (spent.seconds, spent.peak_bytes) == (3.0, 9)


def test_the_table():
    spent = {
        'own': Spent(1.0, 2, 0),
        'decode': Spent(6.0, 4, 3 * 2**20),
        'data_wait': Spent(1.0, 2, 0),
    }
    assert table(spent, 2).splitlines()[2:] == [
        '| data_wait | 0.5000 | 12.5% | 1 |  |',
        '| decode | 3.0000 | 75.0% | 2 | 3 |',
        '| own | 0.5000 | 12.5% | 1 |  |',
    ]
