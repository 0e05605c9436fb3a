"""Adaptive weights, the curriculum and the temperature, by hand and inside the wrapper."""

from __future__ import annotations

import pytest
import torch
from mmengine.logging import MessageHub

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.models import DualLoopModel, GRPOObjective, SFTObjective
from projects.llava_sam2_rl.models.schedule import (
    AdaptiveWeights,
    Curriculum,
    GeometricSchedule,
    current_iteration,
)


@pytest.fixture(scope='module')
def batch(tiny_transform) -> dict:
    scenes = GeneratedScenes(length=8, split='val', transforms=tiny_transform)
    return sa2va_collate([scenes[i] for i in range(3)])


def step(model, encoded):
    """Losses and metrics of one batch."""
    return model.losses(encoded, model.rollout(encoded))


@pytest.mark.parametrize(
    ('rewards', 'expected'),
    [
        ((0.6, 0.2), (1.0 * 2 * 0.4 / 1.2, 0.5 * 2 * 0.8 / 1.2)),
        ((0.3, 0.3), (1.0, 0.5)),
        ((1.0, 1.0), (1.0, 0.5)),
        # The first has reached its goal: its factor 0 is held at 1/3, the second's 2 stands.
        ((1.0, 0.0), (1 / 3, 1.0)),
        # A bonus may lift a reward beyond 1: no negative weight.
        ((1.4, 0.5), (1 / 3, 1.0)),
    ],
)
def test_the_direction_further_from_its_goal_weighs_more(rewards, expected):
    assert AdaptiveWeights().apply((1.0, 0.5), rewards) == pytest.approx(expected)


def test_a_direction_that_is_off_stays_off():
    assert AdaptiveWeights().apply((1.0, 0.0), (0.9, 0.1))[1] == 0.0


def test_large_regions_come_first():
    curriculum = Curriculum(by='region_size', start=0.2, end=0.0, steps=100)
    sizes = [0.25, 0.11, 0.02]
    chosen = [curriculum.choose([4, 5, 6], sizes, [None] * 3, at) for at in (0, 50, 95, 100, 999)]
    # The bound is 0.2, 0.1, 0.01, 0, 0.
    assert chosen == [[4], [4, 5], [4, 5, 6], [4, 5, 6], [4, 5, 6]]
    # Where none is large enough, the largest stays.
    assert curriculum.choose([4, 5], [0.01, 0.03], [None] * 2, 0) == [5]


def test_short_expressions_come_first():
    curriculum = Curriculum(by='expression_length', start=2, end=6, steps=10)
    captions = ['a dog', 'a dog on the left', None, 'the dog that is behind the fence']
    chosen = [curriculum.choose([0, 1, 2, 3], [0.1] * 4, captions, at) for at in (0, 8, 10)]
    # The bound is 2, 5.2 and 6 words; the last has seven.
    assert chosen == [[0, 2], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(by='size', start=1, end=0, steps=3), "by='size' is unknown"),
        (dict(by='region_size', start=0, end=1, steps=3), 'must fall'),
        (dict(by='expression_length', start=5, end=3, steps=3), 'must rise'),
        (dict(by='region_size', start=1, end=0, steps=0), 'steps must be at least 1'),
    ],
)
def test_curriculum_options(options, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**options)


@pytest.mark.parametrize('options', [dict(window=0), dict(limit=1.0)])
def test_adaptive_options(options):
    with pytest.raises(ValueError, match='adaptive_weights'):
        AdaptiveWeights(**options)


def test_misspelled_options_name_the_nearest(tiny_model):
    for name, options in (('curriculum', {'step': 3}), ('adaptive_weights', {'windows': 3})):
        with pytest.raises(TypeError, match=f'{name} has no option'):
            DualLoopModel(tiny_model.policy, GRPOObjective(), **{name: options})


def test_objectives_without_rewards_refuse_adaptive_weights(tiny_model):
    with pytest.raises(ValueError, match='SFTObjective has none'):
        DualLoopModel(tiny_model.policy, SFTObjective(), adaptive_weights={})


def test_the_curriculum_leaves_samples_out_of_the_step(tiny_model, batch):
    options = dict(by='region_size', start=1.0, end=0.0, steps=100)
    model = DualLoopModel(tiny_model.policy, GRPOObjective(), curriculum=options, max_new_tokens=4)
    sizes = [float(mask.any(0).float().mean()) for mask in batch['data']['masks']]
    hub = MessageHub.get_current_instance()
    try:
        hub.update_info('iter', 0)
        _, metrics = step(model, model.encode(batch['data'], ['a', 'b', 'c']))
        largest = 'abc'[sizes.index(max(sizes))]
        assert metrics['curriculum/samples'] == 1
        assert set(model.objective.last_rollouts['mask_to_caption'].reward_inputs.sample_ids) == {
            largest
        }
        hub.update_info('iter', 100)
        _, metrics = step(model, model.encode(batch['data'], ['a', 'b', 'c']))
        assert metrics['curriculum/samples'] == 3
    finally:
        hub.runtime_info.pop('iter')


def test_weights_follow_the_logged_rewards(tiny_model, batch):
    model = DualLoopModel(
        tiny_model.policy, GRPOObjective(), adaptive_weights=dict(window=2), max_new_tokens=4
    )
    encoded = model.encode(batch['data'])
    hub = MessageHub.get_current_instance()
    for key in ('loop1', 'loop2'):
        hub.log_scalars.pop(f'train/{key}/reward_mean', None)
    try:
        _, metrics = step(model, encoded)
        assert (metrics['loop1/weight'], metrics['loop2/weight']) == (1.0, 1.0)
        # Of the last two steps: 0.8 and 0.4.
        for first, second in ((0.0, 0.0), (0.9, 0.3), (0.7, 0.5)):
            hub.update_scalar('train/loop1/reward_mean', first)
            hub.update_scalar('train/loop2/reward_mean', second)
        torch.manual_seed(0)
        losses, metrics = step(model, encoded)
        assert metrics['loop1/weight'] == pytest.approx(2 * 0.2 / 0.8)
        assert metrics['loop2/weight'] == pytest.approx(2 * 0.6 / 0.8)
        # The given weights stay the base: the factors do not pile up.
        _, again = step(model, encoded)
        assert again['loop1/weight'] == metrics['loop1/weight']
        assert set(losses) >= {'loop1/grpo_loss', 'loop2/grpo_loss'}
    finally:
        for key in ('loop1', 'loop2'):
            hub.log_scalars.pop(f'train/{key}/reward_mean', None)


def test_the_temperature_follows_the_runners_iteration():
    schedule = GeometricSchedule(start=2.0, end=0.5, steps=100)
    hub = MessageHub.get_current_instance()
    try:
        for iteration, expected in ((0, 2.0), (50, 1.0), (100, 0.5), (5000, 0.5)):
            hub.update_info('iter', iteration)
            assert schedule.at(current_iteration()) == pytest.approx(expected)
    finally:
        hub.runtime_info.pop('iter')
    assert current_iteration() == 0
    assert GeometricSchedule(0.7, 0.7).at(current_iteration()) == 0.7


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(start=0, end=0), 'start and end must be positive'),
        (dict(start=1.0, end=-1.0, steps=3), 'start and end must be positive'),
        (dict(start=1.0, end=0.5), 'steps must be at least 1'),
        (dict(start=1.0, end=0.5, steps=-1), 'steps must be at least 1'),
    ],
)
def test_temperatures_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        GeometricSchedule(**options)
