"""The control reward: same numbers, other owners."""

from __future__ import annotations

import torch

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards import PermutedReward, RolloutBatch, WeightedRewards, score


class Given:
    name = 'given'

    def __init__(self, values):
        self.values = values

    def __call__(self, rollouts):
        return self.values


def batch(count: int, group: int) -> RolloutBatch:
    return RolloutBatch(
        completions=['x'] * count, num_generations=group, direction='mask_to_caption'
    )


def test_scores_stay_in_their_group_and_change_owners():
    values = [float(i) for i in range(12)]
    values[5] = None
    reward = PermutedReward(Given(values), seed=3)
    seen = [score(reward, batch(12, 4)).rewards for _ in range(30)]
    for rewards in seen:
        for group in range(3):
            mine = rewards[4 * group : 4 * group + 4].tolist()
            expected = [-1.0 if v is None else v for v in values[4 * group : 4 * group + 4]]
            assert sorted(-1.0 if r != r else r for r in mine) == sorted(expected)
    # In thirty draws the first rollout gets each of the four scores of its group.
    owners = torch.stack(seen)[:, 0]
    assert set(owners.tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_the_parts_are_those_that_were_scored():
    output = score(PermutedReward(Given([0.0, 1.0, 2.0, 3.0]), seed=1), batch(4, 4))
    assert output.names == ('given',)
    assert output.rewards_per_func[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert output.rewards.tolist() != [0.0, 1.0, 2.0, 3.0]


def test_it_is_built_from_the_config_of_another_reward():
    reward = REWARDS.build(
        dict(type='PermutedReward', reward=dict(type='MeteorReward', synonyms='off'))
    )
    assert reward.reward.name == 'meteor'


def test_the_terms_change_owners_with_their_sum():
    reward = PermutedReward(
        WeightedRewards([{'type': Given, 'values': [0.0, 1.0, 2.0, 3.0]}]), seed=1
    )
    output = score(reward, batch(4, 4))
    assert output.terms[:, 0].tolist() == output.rewards.tolist() != [0.0, 1.0, 2.0, 3.0]
