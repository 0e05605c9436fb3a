"""The interface: what an objective has to have, and what it gets for nothing."""

from __future__ import annotations

import pytest

from projects.llava_sam2_rl.models import (
    DualLoopModel,
    GRPOObjective,
    GumbelObjective,
    Objective,
    SFTObjective,
)
from projects.llava_sam2_rl.models.objectives.base import check_objective, with_prefix
from projects.llava_sam2_rl.registry import OBJECTIVES


class Least(Objective):
    """What a subclass has to write."""

    def rollout(self, policy, teacher, batch):
        return {}

    def losses(self, policy, batch, rollouts):
        return {}, {}


@OBJECTIVES.register_module(force=True)
class WithoutLossesForTest(Objective):
    def rollout(self, policy, teacher, batch):
        return {}


@OBJECTIVES.register_module(force=True)
class NoObjectiveForTest:
    num_iterations = 1

    def losses(self, policy, batch, rollouts):
        return {}, {}


def test_the_least_objective():
    objective = check_objective(Least())
    assert objective.num_iterations == 1
    assert not objective.gradient_surgery
    assert not objective.has_rewards
    assert objective.last_rollouts == {}
    rollouts = {}
    assert objective.synchronize(rollouts, 'cpu') is rollouts


@pytest.mark.parametrize('objective', [SFTObjective, GumbelObjective, GRPOObjective])
def test_every_objective_of_the_package_is_one(objective):
    assert check_objective(objective()).last_rollouts == {}


def test_the_directions_that_are_on_are_told_at_the_build(tiny_model):
    objective = Least()
    DualLoopModel(tiny_model.policy, objective, mask_to_caption={'weight': 0}, max_new_tokens=7)
    assert objective.directions == {'caption_to_mask'}
    assert objective.max_new_tokens == 7


def test_an_objective_that_lacks_a_method_is_named_at_the_build(tiny_model):
    with pytest.raises(TypeError, match=r'WithoutLossesForTest.*abstract method.*losses'):
        DualLoopModel(tiny_model.policy, dict(type='WithoutLossesForTest'))


def test_an_object_that_is_no_objective_is_told_what_it_lacks(tiny_model):
    with pytest.raises(TypeError, match='NoObjectiveForTest is no objective: derive') as error:
        DualLoopModel(tiny_model.policy, dict(type='NoObjectiveForTest'))
    lacking = str(error.value).split('(it lacks ')[1].rstrip(')').split(', ')
    assert set(lacking) == {
        'gradient_surgery',
        'has_rewards',
        'reads_clips',
        'rollout',
        'setup',
        'synchronize',
    }


def test_log_keys_name_their_direction():
    assert with_prefix('mask_to_caption', {'x': 1}) == {'loop1/x': 1}
    assert with_prefix('caption_to_mask', {'x': 1, 'y': 2}) == {'loop2/x': 1, 'loop2/y': 2}
