import math

import pytest
import torch

from projects.llava_sam2_rl.losses import RewardLossHead
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.rewards import RewardOutput

NAN = math.nan
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
REWARDS = RewardOutput(
    rewards=torch.tensor([1.0, 3.0, 2.0, 2.0]),
    rewards_per_func=torch.tensor([[1.0, NAN], [3.0, NAN], [2.0, 0.5], [2.0, NAN]]),
    names=('mask_iou', 'llm_judge'),
)


def head(**options):
    return MODELS.build({'type': RewardLossHead, 'num_generations': 2, 'beta': 0.0, **options})


def test_loss_and_gradient_by_hand():
    logps = torch.zeros(4, 3, requires_grad=True)
    loss, _ = head(reduction='bnpo')(logps, None, None, MASK, REWARDS)
    # Group 1: mean 2, Bessel std sqrt 2 -> A = -+a; group 2 is all equal -> 0. Eight tokens.
    a = 1 / (math.sqrt(2) + 1e-4)
    assert loss.item() == pytest.approx((2 * a - 3 * a) / 8, abs=1e-6)
    loss.backward()
    expected = torch.tensor([[a, a, 0], [-a, -a, -a], [0, 0, 0], [0, 0, 0]]) / 8
    torch.testing.assert_close(logps.grad, expected)


def test_log_keys_by_hand():
    _, metrics = head()(
        torch.zeros(4, 3),
        None,
        torch.full((4, 3), -1.0),
        MASK,
        REWARDS,
        entropy=torch.tensor([[1.0, 2.0, NAN], [3.0, 3.0, 3.0], [4.0, NAN, NAN], [0.0, 0.0, NAN]]),
        truncated=torch.tensor([False, True, False, False]),
    )
    expected = {
        'reward': 2.0,
        'reward_std': math.sqrt(2) / 2,
        'frac_reward_zero_std': 0.5,
        'frac_reward_unscorable': 0.0,
        'num_groups_unscorable': 0.0,
        'rewards/mask_iou/mean': 2.0,
        'rewards/mask_iou/std': math.sqrt(2 / 3),
        'rewards/mask_iou/frac_unscorable': 0.0,
        'rewards/llm_judge/mean': 0.5,
        'rewards/llm_judge/std': 0.0,
        'rewards/llm_judge/frac_unscorable': 0.75,
        'kl': math.exp(-1),
        'entropy': 2.0,
        'clip_ratio/low_mean': 0.0,
        'clip_ratio/high_mean': 0.0,
        'clip_ratio/region_mean': 0.0,
        'completions/mean_length': 2.0,
        'completions/min_length': 1.0,
        'completions/max_length': 3.0,
        'completions/clipped_ratio': 0.25,
    }
    a = 1 / (math.sqrt(2) + 1e-4)
    expected['policy_term'] = (a - a) / 4  # means over tokens are the advantages themselves
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(
        expected, abs=1e-6
    )
    assert not any('loss' in key for key in metrics)
    assert not any(value.requires_grad for value in metrics.values())


def test_entropy_bonus():
    entropy = torch.ones(4, 3, requires_grad=True)
    plain, _ = head()(torch.zeros(4, 3), None, None, MASK, REWARDS)
    loss, metrics = head(entropy_coef=0.5)(
        torch.zeros(4, 3), None, None, MASK, REWARDS, entropy=entropy
    )
    assert (plain - loss).item() == pytest.approx(0.5)
    assert metrics['entropy'].item() == 1
    loss.backward()
    torch.testing.assert_close(entropy.grad, -0.5 * MASK / 8)


def test_dropping_truncated_completions():
    truncated = torch.tensor([False, True, False, False])
    logps = torch.zeros(4, 3, requires_grad=True)
    loss, _ = head(reduction='bnpo', drop_truncated=True)(
        logps, None, None, MASK, REWARDS, truncated=truncated
    )
    # It still counts in its group's statistics: the first one keeps its advantage. Five tokens.
    assert loss.item() == pytest.approx(2 / (math.sqrt(2) + 1e-4) / 5, abs=1e-6)
    loss.backward()
    assert (logps.grad != 0).any(1).tolist() == [True, False, False, False]


def test_dropping_zero_variance_groups_drops_their_kl_and_tokens():
    ref = torch.full((4, 3), -1.0)
    options = {'reduction': 'bnpo', 'beta': 1.0}
    logps = torch.zeros(4, 3, requires_grad=True)
    dropping = head(drop_zero_variance_groups=True, **options)
    loss, _ = dropping(logps, None, ref, MASK, REWARDS)
    a = 1 / (math.sqrt(2) + 1e-4)
    assert loss.item() == pytest.approx(-a / 5 + math.exp(-1), abs=1e-6)
    loss.backward()
    assert (logps.grad != 0).any(1).tolist() == [True, True, False, False]
    assert dropping.loss_mask(REWARDS.rewards, MASK).sum().item() == 5
    kept, _ = head(**options)(logps, None, ref, MASK, REWARDS)
    assert kept.item() == pytest.approx(-a / 8 + math.exp(-1), abs=1e-6)


def test_unscorable_rewards_as_a_bare_tensor():
    logps = torch.zeros(4, 3, requires_grad=True)
    rewards = torch.tensor([NAN, NAN, 0.0, NAN])
    loss, metrics = head()(logps, None, None, MASK, rewards)
    loss.backward()
    assert loss.item() == 0
    assert logps.grad.abs().sum() == 0
    assert metrics['num_groups_unscorable'].item() == 1
    assert metrics['frac_reward_unscorable'].item() == 0.75


def test_options_reach_the_loss():
    old = torch.full((4, 3), -math.log(1.5))
    arguments = (torch.zeros(4, 3), old, None, MASK, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    options = {'reduction': 'dapo', 'epsilon_low': 0.2, 'scale_rewards': 'none'}
    # ratio 1.5; A = -0.5 over 2 tokens unclipped, A = +0.5 over 3 tokens clipped at the upper end
    for high, clip in ((None, 1.2), (0.28, 1.28)):
        loss, _ = head(epsilon_high=high, **options)(*arguments, num_active_tokens=10)
        assert loss.item() == pytest.approx((0.75 * 2 - 0.5 * clip * 3) / 10, abs=1e-6)
    loss, _ = head(**{**options, 'reduction': 'dr_grpo'}, max_completion_length=5)(*arguments)
    assert loss.item() == pytest.approx((0.75 * 2 - 0.6 * 3) / 20, abs=1e-6)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'num_generations': 1}, 'got 1'),
        ({'reduction': 'x'}, "reduction='x'"),
        ({'scale_rewards': 'x'}, "scale_rewards='x'"),
        ({'importance_sampling_level': 'x'}, "importance_sampling_level='x'"),
        ({'beta': -0.1}, 'beta'),
        ({'entropy_coef': -0.1}, 'entropy_coef'),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        head(**options)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'beta': 0.1}, 'needs a reference'),
        ({'entropy_coef': 0.1}, 'pass entropy'),
        ({'drop_truncated': True}, 'pass truncated'),
    ],
)
def test_missing_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        head(**options)(torch.zeros(4, 3), None, None, MASK, REWARDS)


#: Two rewards with weights 1 and 2: -1 0 1 and 1 -1 0 over a standard deviation of 1.
APART = RewardOutput(
    rewards=torch.tensor([4.0, 1.0, 4.0]) / 3,
    rewards_per_func=torch.tensor([[0.0, 2.0], [1.0, 0.0], [2.0, 1.0]]),
    names=('a', 'b'),
    terms=torch.tensor([[0.0, 2.0], [1.0, 0.0], [2.0, 1.0]]),
    weights=(1.0, 2.0),
)


def test_rewards_that_are_normalised_apart():
    apart = head(num_generations=3, multi_objective_aggregation='normalize_then_sum')
    assert apart.divides_by_batch
    # (1, -2, 1) over 1.0001, and over their standard deviation sqrt 3 / 1.0001.
    scale = 1.0001 * (math.sqrt(3) / 1.0001 + 1e-4)
    expected = [1 / scale, -2 / scale, 1 / scale]
    assert apart.advantages(APART).tolist() == pytest.approx(expected, abs=1e-6)
    logps = torch.zeros(3, 1, requires_grad=True)
    apart(logps, None, None, torch.ones(3, 1), APART)[0].backward()
    assert (-3 * logps.grad[:, 0]).tolist() == pytest.approx(expected, abs=1e-6)
    # A spread that other ranks have a part in: that of the summed advantages.
    summed = apart.scaled_by_batch(APART)
    assert summed.tolist() == pytest.approx([1 / 1.0001, -2 / 1.0001, 1 / 1.0001])
    assert apart.advantages(APART, torch.tensor(1.0)).tolist() == pytest.approx(
        [x / 1.0001 for x in summed.tolist()]
    )
    # One reward alone, and a tensor, is one term.
    lone = apart.advantages(torch.tensor([0.0, 1.0, 2.0]))
    assert lone.tolist() == pytest.approx([-1, 0, 1], abs=1e-3)


def test_a_group_of_equal_sums_still_differs_reward_by_reward():
    traded = RewardOutput(
        rewards=torch.tensor([0.5, 0.5]),
        rewards_per_func=torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        names=('a', 'b'),
        terms=torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        weights=(1.0, 1.0),
    )
    mask = torch.ones(2, 1)
    options = {'drop_zero_variance_groups': True}
    assert not head(**options).loss_mask(traded, mask).any()
    apart = head(**options, multi_objective_aggregation='normalize_then_sum')
    assert apart.loss_mask(traded, mask).all()


def test_only_the_least_sure_tokens_are_learnt():
    logps = torch.zeros(4, 3, requires_grad=True)
    entropy = torch.tensor([[0.1, 9.0, NAN], [8.0, 0.1, 0.1], [0.1, NAN, NAN], [0.1, 0.1, NAN]])
    quarter = head(reduction='bnpo', top_entropy_quantile=0.25)
    quarter(logps, None, None, MASK, REWARDS, entropy=entropy)[0].backward()
    a = 1 / (math.sqrt(2) + 1e-4)
    expected = torch.tensor([[0, a, 0], [-a, 0, 0], [0, 0, 0], [0, 0, 0]]) / 8
    torch.testing.assert_close(logps.grad, expected)
    with pytest.raises(ValueError, match=r'top_entropy_quantile=0.25 needs the entropy'):
        quarter(logps, None, None, MASK, REWARDS)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'multi_objective_aggregation': 'gdpo'}, 'use one of sum_then_normalize, normalize_then'),
        ({'surrogate': 'ppo'}, 'use one of clip, cispo, sapo'),
        ({'sapo_temperature_neg': 0.0}, 'must be positive'),
        ({'top_entropy_quantile': 0.0}, r'must lie in \(0, 1\]'),
        (
            {
                'num_generations': 1,
                'scale_rewards': 'none',
                'multi_objective_aggregation': 'normalize_then_sum',
            },
            "aggregation='normalize_then_sum' needs num_generations >= 2",
        ),
    ],
)
def test_bad_values_of_the_newer_options(options, words):
    with pytest.raises(ValueError, match=words):
        head(**options)


def test_sapo_and_cispo_reach_the_loss():
    found = []
    for surrogate in ('clip', 'cispo', 'sapo'):
        logps = torch.full((4, 3), math.log(2), requires_grad=True)
        head(surrogate=surrogate, reduction='bnpo')(logps, torch.zeros(4, 3), None, MASK, REWARDS)[
            0
        ].backward()
        found.append(logps.grad[1, 0].item())
    # rho = 2, A = a > 0: cut; its weight cut to 1.2; the slope of the gate, 4 s (1 - s) rho.
    a, s = 1 / (math.sqrt(2) + 1e-4), 1 / (1 + math.exp(-1))
    expected = [0.0, -1.2 * a / 8, -4 * s * (1 - s) * 2 * a / 8]
    assert found == pytest.approx(expected, abs=1e-6)
