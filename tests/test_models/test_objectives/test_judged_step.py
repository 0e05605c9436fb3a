"""A GRPO step does not wait for its judge, a real HTTP server, while it has other work."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from test_rewards.judge_server import judge_server
from test_rewards.test_judge_training import QUESTIONS

from projects.llava_sam2_rl.engine.timing import phases
from projects.llava_sam2_rl.models import DualLoopModel, GRPOObjective
from projects.llava_sam2_rl.rewards import LLMJudgeReward
from test_models.batches import encode

#: Of one answer, seconds. Questions are written first, then all of them are asked at once.
LATENCY = 0.15


class WithoutStart:
    """The same judge, called when its scores are needed."""

    name = 'llm_judge'

    def __init__(self, judge):
        self.judge = judge

    def __call__(self, rollouts):
        return self.judge(rollouts)


def answer(prompt, number):
    """Likes captions by their length, so that a group varies."""
    if 'Write multiple-choice questions' in prompt:
        return json.dumps(QUESTIONS)
    if 'object likely a' in prompt:
        return 'Yes'
    caption = prompt.split('Description: ')[1].split('\n')[0]
    if 'What color' in prompt:
        return ('red', 'not mentioned', 'blue')[len(caption) % 3]
    return 'nothing of it'


def build(tiny_model, judge, direction='caption_to_mask') -> DualLoopModel:
    objective = GRPOObjective(num_generations=3, **{direction: {'reward': judge}})
    return DualLoopModel(tiny_model.policy, objective, max_new_tokens=6)


def judge_at(url, folder, **options) -> LLMJudgeReward:
    options = {'backoff': 0.01, 'timeout': 60.0, **options}
    return LLMJudgeReward('judge', url, cache_dir=str(folder), **options)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')


@pytest.mark.parametrize(
    ('direction', 'name', 'work'),
    [
        ('caption_to_mask', 'mask_to_caption', 'sample'),
        ('mask_to_caption', 'caption_to_mask', 'described'),
    ],
)
def test_the_judge_is_at_work_while_the_other_direction_generates(
    tiny_model, batch, tmp_path, monkeypatch, direction, name, work
):
    generating, in_time = threading.Event(), []

    def when_generating(prompt, number):
        in_time.append(generating.wait(20))
        return answer(prompt, number)

    with judge_server(when_generating) as server:
        model = build(tiny_model, judge_at(server.url, tmp_path), direction)
        other = getattr(model.objective, name)
        inner = getattr(other, work)

        def generate(*args):
            generating.set()
            return inner(*args)

        monkeypatch.setattr(other, work, generate)
        rollouts = model.rollout(encode(model, batch))
    assert in_time
    assert all(in_time), 'the step waited for the judge before it went on'
    # The third sample has no caption, and so nothing to be judged by in mask_to_caption.
    assert not rollouts[direction].scored.rewards[:6].isnan().any()


def test_the_waiting_is_hidden_and_the_rewards_are_the_same(
    tiny_model, batch, tmp_path, monkeypatch
):
    found, spent = [], []
    with judge_server(answer, LATENCY) as server:
        for number, wrap in enumerate((lambda judge: judge, WithoutStart)):
            judge = judge_at(server.url, tmp_path / str(number))
            model = build(tiny_model, wrap(judge))
            assert model.objective._order[0] == ('caption_to_mask', 'mask_to_caption')[number]
            monkeypatch.setattr(model.objective, '_order', ['caption_to_mask', 'mask_to_caption'])
            direction = model.objective.mask_to_caption
            sample = direction.sample

            def at_least_as_slow_as_the_judge(*args, sample=sample):
                for thread in threading.enumerate():
                    if thread.name == 'reward':
                        thread.join(60)
                        assert not thread.is_alive(), 'the judge did not answer within 60 s'
                return sample(*args)

            monkeypatch.setattr(direction, 'sample', at_least_as_slow_as_the_judge)
            encoded = encode(model, batch)
            phases.take()
            torch.manual_seed(0)
            found.append(model.rollout(encoded)['caption_to_mask'])
            spent.append(phases.take())
    early, late = spent
    assert 'rewards_hidden' not in late
    assert late['rewards'].seconds > 2 * LATENCY
    assert early['rewards_hidden'].seconds > 2 * LATENCY
    # The step takes less than the sum: nothing is left to be waited for.
    assert early['rewards'].seconds < 2 * LATENCY
    assert found[0].captions == found[1].captions
    assert torch.equal(found[0].scored.rewards, found[1].scored.rewards)
    assert torch.equal(found[0].advantages, found[1].advantages)


def test_a_judge_that_is_down_leaves_the_step_unscored(tiny_model, batch, tmp_path):
    with judge_server(answer) as server:
        gone = server.url
    options = {'max_retries': 0, 'max_consecutive_failures': 1}
    model = build(tiny_model, judge_at(gone, tmp_path, **options))
    rollout = model.rollout(encode(model, batch))['caption_to_mask']
    assert gone in rollout.scored.failure
    assert rollout.scored.rewards.isnan().all()
    assert not rollout.advantages.any()


def test_without_a_judge_random_numbers_are_drawn_in_the_old_order(tiny_model):
    assert build(tiny_model, None).objective._order == ['mask_to_caption', 'caption_to_mask']
