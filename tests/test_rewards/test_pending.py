"""Rewards that are started when the captions are there, and collected when they are needed."""

from __future__ import annotations

import math
import threading
import time

import pytest
import torch

from projects.llava_sam2_rl.rewards import (
    PendingScores,
    PermutedReward,
    RewardUnavailableError,
    RolloutBatch,
    WeightedRewards,
    can_start,
    score,
    start,
)

TEXTS = RolloutBatch(['a', 'b', 'c', 'd'], 2, 'caption_to_mask')


class Slow:
    """Answers when it may; says in which thread it was asked."""

    def __init__(self, values=(0.1, 0.2, 0.3, None), name='slow'):
        self.name = name
        self.values = list(values)
        self.may_answer = threading.Event()
        self.threads: list[threading.Thread] = []

    def start(self, rollouts):
        return PendingScores(lambda: self(rollouts))

    def __call__(self, rollouts):
        self.threads.append(threading.current_thread())
        assert self.may_answer.wait(30), 'nobody let it answer'
        if isinstance(self.values[0], Exception):
            raise self.values[0]
        return self.values


class Plain:
    name = 'plain'

    def __call__(self, rollouts):
        return [1.0, 0.0, 1.0, 0.5]


def nested(slow):
    """A judge two floors down."""
    inner = WeightedRewards([{'type': lambda: slow, 'weight': 3.0}, {'type': Plain}])
    return PermutedReward(WeightedRewards([{'type': lambda: inner}]))


def test_starting_does_not_wait_and_collecting_does():
    slow = Slow()
    started = start(slow, TEXTS)
    assert slow.threads != [threading.current_thread()]
    slow.may_answer.set()
    found = score(slow, TEXTS, started).rewards
    torch.testing.assert_close(found, torch.tensor([0.1, 0.2, 0.3, math.nan]), equal_nan=True)
    assert len(slow.threads) == 1
    # A run that fails ends although a judge has not answered.
    assert slow.threads[0].daemon


def test_parts_of_parts_are_started_and_asked_once():
    slow = Slow([1.0, 0.0, 0.0, None])
    started = start(nested(slow), TEXTS)
    slow.may_answer.set()
    found = score(nested(slow), TEXTS, started)
    assert len(slow.threads) == 1
    # Of the first group (3·1 + 1) / 4 and 0, of the second 1 / 4 and, the judge declining, 0.5.
    assert sorted(found.rewards[:2].tolist()) == [0.0, 1.0]
    assert sorted(found.rewards[2:].tolist()) == pytest.approx([0.25, 0.5])
    # What was not started is asked.
    torch.testing.assert_close(found.rewards, score(nested(slow), TEXTS).rewards)
    assert len(slow.threads) == 2


def test_what_can_be_started():
    assert can_start(Slow())
    assert can_start(nested(Slow()))
    assert not can_start(Plain())
    assert not can_start(WeightedRewards([{'type': Plain}]))
    assert start(WeightedRewards([{'type': Plain}]), TEXTS) == {}


def test_a_reward_that_gives_up_says_so_when_it_is_collected():
    slow = Slow([RewardUnavailableError('nobody answers')])
    slow.may_answer.set()
    started = start(nested(slow), TEXTS)
    output = score(nested(slow), TEXTS, started)
    assert output.failure == 'nobody answers'
    assert output.rewards.isnan().all()


def test_other_errors_are_raised_when_it_is_collected():
    slow = Slow([KeyError('a fault of its own')])
    slow.may_answer.set()
    started = start(slow, TEXTS)
    with pytest.raises(KeyError, match='a fault of its own'):
        score(slow, TEXTS, started)


def test_scores_that_break_the_contract_are_refused_as_ever():
    slow = Slow([0.5])
    slow.may_answer.set()
    with pytest.raises(ValueError, match="'slow' returned 1 values for 4 completions"):
        score(slow, TEXTS, start(slow, TEXTS))


def test_hidden_is_the_time_before_anyone_waited(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    slow = Slow()
    (waited,) = start(slow, TEXTS).values()
    now[0] += 3  # other work
    assert waited.hidden == 3
    waiter = threading.Thread(target=waited.result)
    waiter.start()
    while waited._collected is None:
        pass
    now[0] += 5  # nothing else was done
    slow.may_answer.set()
    waiter.join(30)
    assert waited.hidden == 3

    (done,) = start(slow, TEXTS).values()
    while done._ended is None:
        pass
    now[0] += 7  # it had answered before the work was done
    done.result()
    assert done.hidden == 0
