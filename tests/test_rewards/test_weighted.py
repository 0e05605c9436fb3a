import math

import pytest
import torch

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards import LengthReward, RolloutBatch, WeightedRewards


class Fixed:
    def __init__(self, values, label='fixed'):
        self.values = values
        self.name = label

    def __call__(self, rollouts):
        return self.values


def fixed(label, *values, **config):
    return {'type': Fixed, 'values': list(values), 'label': label, **config}


ROLLOUTS = RolloutBatch(['a'] * 4, 4, 'mask_to_caption')


def test_weights_are_renormalised_over_what_could_be_scored():
    reward = WeightedRewards(
        [
            fixed('a', 1.0, 1.0, None, None, weight=0.25),
            fixed('b', 0.2, None, 0.4, None, weight=0.75),
        ]
    )
    assert reward(ROLLOUTS) == pytest.approx([0.25 + 0.15, 1.0, 0.4, None])
    output = reward.score(ROLLOUTS)
    assert output.names == ('a', 'b')
    expected = [[1.0, 0.2], [1.0, math.nan], [math.nan, 0.4], [math.nan, math.nan]]
    torch.testing.assert_close(output.rewards_per_func, torch.tensor(expected), equal_nan=True)


def test_factors_multiply_and_may_decline():
    reward = REWARDS.build(
        {
            'type': 'WeightedRewards',
            'rewards': [fixed('a', 1.0, 0.5, 0.5, None)],
            'factors': [fixed('f', 0.5, 0.5, None, 1.0), fixed('g', 1.0, 0.0, 1.0, 1.0)],
        }
    )
    assert reward(ROLLOUTS) == [0.5, 0.0, None, None]
    assert reward.score(ROLLOUTS).rewards_per_func.shape == (4, 3)


def test_weight_zero_is_logged_but_not_counted():
    reward = WeightedRewards(
        [fixed('a', 0.5, None, 0.5, 0.5), fixed('b', 1.0, 1.0, None, 1.0, weight=0.0)]
    )
    assert reward(ROLLOUTS) == [0.5, None, 0.5, 0.5]


def test_registered_names_and_own_names():
    config = {
        'type': 'WeightedRewards',
        'rewards': [{'type': 'LengthReward', 'weight': 2.0, 'name': 'short', 'max_words': 5}],
        'factors': [{'type': LengthReward}],
    }
    before = repr(config)
    reward = REWARDS.build(config)
    assert reward.names == ('short', 'length')
    assert repr(config) == before


def test_the_default_is_the_caption_reward(monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    reward = WeightedRewards()
    assert reward.names == ('meteor', 'llm_judge')
    assert reward.reward_weights == [0.25, 0.75]


@pytest.mark.parametrize(
    ('rewards', 'words'),
    [
        ([fixed('a', weight=-1.0), fixed('b', weight=2.0)], 'must not be negative'),
        ([fixed('a', weight=0.0)], 'one must be positive'),
        ([], 'one must be positive'),
        ([fixed('a'), fixed('a')], 'share the name a'),
    ],
)
def test_bad_options_are_named(rewards, words):
    with pytest.raises(ValueError, match=words):
        WeightedRewards(rewards)


def test_the_terms_of_the_mean_are_reported():
    """What is only logged is no term; a factor belongs to every one of them."""
    reward = WeightedRewards(
        rewards=[
            fixed('a', 0.4, 0.8, weight=1),
            fixed('b', 1.0, None, weight=3),
            fixed('c', 0.3, 0.3, weight=0),
        ],
        factors=[fixed('f', 0.5, 1.0)],
    )
    output = reward.score(RolloutBatch(['x', 'y'], 2, 'mask_to_caption'))
    assert output.weights == (1.0, 3.0)
    torch.testing.assert_close(
        output.terms, torch.tensor([[0.2, 0.5], [0.8, math.nan]]), equal_nan=True
    )
    # (1 · 0.2 + 3 · 0.5) / 4, and the one that could be scored.
    assert output.rewards.tolist() == pytest.approx([0.425, 0.8])
