"""Every expected number is worked out by hand from the formulas in the comments."""

import math

import pytest
import torch

from projects.llava_sam2_rl.losses import (
    gaussian_kl,
    gaussian_logprob,
    group_advantages,
    grpo_loss,
    k3,
    top_entropy_mask,
)

OPTIONS = {'epsilon_low': 0.2, 'epsilon_high': 0.2, 'beta': 0.0, 'reduction': 'grpo'}
# Two completions of 3 and 1 tokens. rho = exp(log-ratio):
#   A = +2: rho 1, 1.5 (above 1.2), 0.5  -> -min(rho A, clip A) = -2, -2.4, -1.0
#   A = -1: rho 0.5 (below 0.8)          -> -min(-0.5, -0.8)    = +0.8
RATIO = torch.tensor([[1.0, 1.5, 0.5], [0.5, 1.0, 1.0]])
OLD = torch.full((2, 3), -2.0)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
ADVANTAGES = torch.tensor([2.0, -1.0])


def logps(ratio=RATIO):
    return (OLD + ratio.log()).requires_grad_()


@pytest.mark.parametrize(
    ('reduction', 'expected'),
    [
        ('grpo', (-5.4 / 3 + 0.8) / 2),
        ('bnpo', (-5.4 + 0.8) / 4),
        ('dr_grpo', (-5.4 + 0.8) / (2 * 10)),
        ('dapo', (-5.4 + 0.8) / 4),
    ],
)
def test_reductions(reduction, expected):
    loss, metrics = grpo_loss(
        logps(),
        OLD,
        None,
        ADVANTAGES,
        MASK,
        **{**OPTIONS, 'reduction': reduction},
        max_completion_length=10,
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert metrics['policy_term'].item() == pytest.approx(expected, abs=1e-6)


def test_dapo_takes_the_callers_normaliser():
    options = {**OPTIONS, 'reduction': 'dapo'}
    for active in (8, 8.0, torch.tensor(8)):
        loss, _ = grpo_loss(
            logps(), OLD, None, ADVANTAGES, MASK, **options, num_active_tokens=active
        )
        assert loss.item() == pytest.approx(-4.6 / 8, abs=1e-6)


def test_dr_grpo_without_a_limit_takes_the_width():
    loss, _ = grpo_loss(logps(), OLD, None, ADVANTAGES, MASK, **{**OPTIONS, 'reduction': 'dr_grpo'})
    assert loss.item() == pytest.approx(-4.6 / 6, abs=1e-6)


def test_clip_metrics_and_gradient_on_both_sides():
    values = logps()
    loss, metrics = grpo_loss(
        values, OLD, None, ADVANTAGES, MASK, **{**OPTIONS, 'reduction': 'bnpo'}
    )
    loss.backward()
    # d(-rho A)/dlogp = -rho A where not clipped: -2, clipped, -1; second clipped. Over 4 tokens.
    expected = torch.tensor([[-0.5, 0.0, -0.25], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(values.grad, expected)
    assert metrics['clip_ratio/high_mean'].item() == 0.25
    assert metrics['clip_ratio/low_mean'].item() == 0.25
    assert metrics['clip_ratio/region_mean'].item() == 0.5
    assert not any(value.requires_grad for value in metrics.values())
    assert not any('loss' in name for name in metrics)


def test_sides_that_are_outside_the_range_but_do_not_clip():
    # A < 0 with rho above, A > 0 with rho below: the unclipped term is the smaller one.
    ratio = torch.tensor([[1.5], [0.5]])
    loss, metrics = grpo_loss(
        (OLD[:, :1] + ratio.log()),
        OLD[:, :1],
        None,
        torch.tensor([-1.0, 1.0]),
        MASK[:, :1],
        **OPTIONS,
    )
    assert loss.item() == pytest.approx((1.5 - 0.5) / 2)
    assert metrics['clip_ratio/region_mean'].item() == 0


def test_asymmetric_clip():
    loss, _ = grpo_loss(
        torch.tensor([[1.5, 0.5]]).log(),
        torch.zeros(1, 2),
        None,
        torch.tensor([1.0]),
        torch.ones(1, 2),
        **{**OPTIONS, 'epsilon_high': 0.28},
    )
    assert loss.item() == pytest.approx(-(1.28 + 0.5) / 2, abs=1e-6)
    loss, _ = grpo_loss(
        torch.tensor([[1.5, 0.5]]).log(),
        torch.zeros(1, 2),
        None,
        torch.tensor([-1.0]),
        torch.ones(1, 2),
        **{**OPTIONS, 'epsilon_low': 0.3, 'epsilon_high': 0.28},
    )
    assert loss.item() == pytest.approx((1.5 + 0.7) / 2, abs=1e-6)


def test_k3_by_hand():
    # d = ln 2: 2 - ln 2 - 1; d = -1: e^-1 + 1 - 1; d = 0: 0
    values = k3(torch.tensor([0.0, 0.0, -3.0]), torch.tensor([math.log(2), -1.0, -3.0]))
    assert values.tolist() == pytest.approx([1 - math.log(2), math.exp(-1), 0.0], abs=1e-6)


def test_k3_is_clamped_and_stops_pulling_there():
    new = torch.tensor([-100.0, -20.0], requires_grad=True)
    values = k3(new, torch.tensor([0.0, 0.0]))
    assert values.tolist() == pytest.approx([math.exp(20) - 21] * 2)
    values[0].backward()
    assert new.grad.tolist() == [0.0, 0.0]


def test_kl_term_value_and_gradient():
    values = torch.zeros(1, 2, requires_grad=True)
    ref = torch.tensor([[math.log(2), -1.0]])
    options = {**OPTIONS, 'beta': 0.1}
    loss, metrics = grpo_loss(values, None, ref, torch.tensor([0.0]), torch.ones(1, 2), **options)
    kl = ((1 - math.log(2)) + math.exp(-1)) / 2
    assert metrics['kl'].item() == pytest.approx(kl, abs=1e-6)
    assert loss.item() == pytest.approx(0.1 * kl, abs=1e-6)
    assert metrics['policy_term'].item() == 0
    loss.backward()
    # d k3/d logpi = 1 - exp(d)
    expected = [0.05 * (1 - 2), 0.05 * (1 - math.exp(-1))]
    assert values.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_kl_in_closed_form_replaces_k3():
    kl = torch.tensor([[0.5], [1.5]], requires_grad=True)
    loss, metrics = grpo_loss(
        torch.zeros(2, 1),
        None,
        None,
        torch.zeros(2),
        torch.ones(2, 1),
        **{**OPTIONS, 'beta': 0.2},
        per_token_kl=kl,
    )
    assert loss.item() == pytest.approx(0.2)
    assert metrics['kl'].item() == 1
    loss.backward()
    assert kl.grad.flatten().tolist() == pytest.approx([0.1, 0.1])


def test_reference_is_only_measured_at_beta_zero():
    values = torch.zeros(1, 1, requires_grad=True)
    loss, metrics = grpo_loss(
        values, None, torch.full((1, 1), -1.0), torch.zeros(1), torch.ones(1, 1), **OPTIONS
    )
    assert loss.item() == 0
    assert metrics['kl'].item() == pytest.approx(math.exp(-1))
    _, metrics = grpo_loss(values, None, None, torch.zeros(1), torch.ones(1, 1), **OPTIONS)
    assert 'kl' not in metrics


@pytest.mark.parametrize('level', ['token', 'sequence'])
@pytest.mark.parametrize('reduction', ['grpo', 'bnpo', 'dr_grpo', 'dapo'])
@pytest.mark.parametrize('junk', [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_touch_nothing(junk, reduction, level):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    advantages = torch.tensor([1.0, -1.0])
    options = {**OPTIONS, 'beta': 0.1, 'reduction': reduction, 'importance_sampling_level': level}

    def run(fill):
        holes = mask == 0
        tensors = [
            torch.full((2, 3), value).masked_fill(holes, fill) for value in (-1.0, -1.1, -0.9)
        ]
        tensors[0].requires_grad_()
        loss, metrics = grpo_loss(*tensors, advantages, mask, **options, max_completion_length=5)
        loss.backward()
        return loss.item(), tensors[0].grad, {key: value.item() for key, value in metrics.items()}

    loss, grad, metrics = run(junk)
    clean_loss, clean_grad, clean_metrics = run(0.0)
    assert (loss, metrics) == (clean_loss, clean_metrics)
    assert torch.equal(grad, clean_grad)
    assert grad[mask == 0].tolist() == [0.0] * 4
    assert (grad[mask == 1] != 0).all()


def test_empty_completion_counts_zero_in_the_mean():
    loss, _ = grpo_loss(
        torch.zeros(2, 2),
        None,
        None,
        torch.tensor([1.0, 5.0]),
        torch.tensor([[1, 1], [0, 0]]),
        **OPTIONS,
    )
    assert loss.item() == -0.5


def test_sequence_level_ratio_by_hand():
    # mean log-ratios: (ln 2 + 0) / 2 over two active tokens, and ln 0.5 over one.
    log_ratio = torch.tensor([[math.log(2), 0.0, 9.0], [math.log(0.5), 9.0, 9.0]])
    values = log_ratio.clone().requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss, metrics = grpo_loss(
        values,
        torch.zeros(2, 3),
        None,
        torch.tensor([-1.0, -1.0]),
        mask,
        **OPTIONS,
        importance_sampling_level='sequence',
    )
    # A = -1: -min(-rho, -clip) = max(rho, clip) = sqrt 2, and 0.8 (clipped below)
    assert loss.item() == pytest.approx((math.sqrt(2) + 0.8) / 2, abs=1e-6)
    assert metrics['clip_ratio/low_mean'].item() == 0.5
    assert metrics['clip_ratio/high_mean'].item() == 0
    loss.backward()
    # d rho / d logp_t = rho / 2 at both tokens, halved by the mean over completions
    expected = torch.tensor([[math.sqrt(2) / 4, math.sqrt(2) / 4, 0], [0, 0, 0]])
    torch.testing.assert_close(values.grad, expected)


def test_on_policy_value_is_zero_but_gradient_is_not():
    values = torch.full((2, 2), -1.0, requires_grad=True)
    advantages = group_advantages(torch.tensor([0.0, 1.0]), 2)
    loss, _ = grpo_loss(values, None, None, advantages, torch.ones(2, 2), **OPTIONS)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    # A = ±0.5 / (sqrt(0.5) + 1e-4), gradient -A / 4
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert values.grad.flatten().tolist() == pytest.approx([a / 4, a / 4, -a / 4, -a / 4], abs=1e-6)


def test_zero_variance_group_and_unscorable_completion_get_no_gradient():
    rewards = torch.tensor([0.3, 0.3, 0.3, 0.0, 1.0, math.nan])
    values = torch.zeros(6, 2, requires_grad=True)
    loss, _ = grpo_loss(
        values, None, None, group_advantages(rewards, 3), torch.ones(6, 2), **OPTIONS
    )
    loss.backward()
    assert (values.grad != 0).any(1).tolist() == [False, False, False, True, True, False]


def test_wild_ratio_stays_finite():
    values = torch.tensor([[500.0]], requires_grad=True)
    loss, _ = grpo_loss(
        values, torch.zeros(1, 1), None, torch.tensor([-1.0]), torch.ones(1, 1), **OPTIONS
    )
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-5)


def test_half_precision_is_computed_in_float32():
    values = logps().detach().bfloat16()
    loss, _ = grpo_loss(values, values, None, ADVANTAGES, MASK, **OPTIONS)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'reduction': 'mean'}, "'mean' is unknown: use one of grpo, bnpo, dr_grpo, dapo"),
        ({'importance_sampling_level': 'word'}, 'token, sequence'),
        ({'beta': 0.1}, 'beta=0.1 needs a reference'),
        ({'beta': -1.0}, 'negative'),
        ({'advantages': torch.zeros(3)}, r'advantages is \(3,\)'),
        ({'completion_mask': torch.ones(2, 4)}, r'completion_mask is \(2, 4\)'),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {
        'per_token_logps': logps(),
        'old_per_token_logps': OLD,
        'ref_per_token_logps': None,
        'advantages': ADVANTAGES,
        'completion_mask': MASK,
        **OPTIONS,
        **change,
    }
    with pytest.raises(ValueError, match=words):
        grpo_loss(**arguments)


def test_gaussian_logprob_matches_torch_up_to_the_constant():
    generator = torch.Generator().manual_seed(0)
    z, mean, other = (torch.randn(3, 8, generator=generator) for _ in range(3))
    normal = torch.distributions.Normal
    expected = normal(mean, 0.3).log_prob(z).sum(-1) - normal(other, 0.3).log_prob(z).sum(-1)
    actual = gaussian_logprob(z, mean, 0.3) - gaussian_logprob(z, other, 0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        gaussian_logprob(z, mean, 0.3, dims='mean') * 8, gaussian_logprob(z, mean, 0.3)
    )


def test_gaussian_action_is_data():
    mean = torch.zeros(1, 2, requires_grad=True)
    z = mean + torch.tensor([[1.0, -2.0]])
    gaussian_logprob(z, mean, 0.5).sum().backward()
    # d/dmu of -(z-mu)^2 / (2 s^2) = (z - mu) / s^2; through z it would be 0.
    assert mean.grad.tolist() == [[4.0, -8.0]]


def test_gaussian_kl_matches_torch():
    mean, ref = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.0, 1.0]])
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, 2.0), normal(ref, 2.0))
    torch.testing.assert_close(gaussian_kl(mean, ref, 2.0), expected.sum(-1))
    torch.testing.assert_close(
        gaussian_kl(mean, ref, torch.tensor([[2.0]]), dims='mean'), expected.mean(-1)
    )


def test_gaussian_bad_input():
    with pytest.raises(ValueError, match='sigma must be positive'):
        gaussian_logprob(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)
    with pytest.raises(ValueError, match='dims='):
        gaussian_kl(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, dims='max')
    with pytest.raises(ValueError, match='shapes differ'):
        gaussian_kl(torch.zeros(1, 2), torch.zeros(2), 1.0)


def test_cispo_by_hand():
    """The weight is cut to 0.8 … 1.2 and has no gradient: every token keeps its own."""
    values = logps()
    options = {**OPTIONS, 'reduction': 'bnpo', 'surrogate': 'cispo'}
    loss, metrics = grpo_loss(values, OLD, None, ADVANTAGES, MASK, **options)
    down = -2 - math.log(2)
    expected = -2 * (-2 + 1.2 * (-2 + math.log(1.5)) + 0.8 * down) + 0.8 * down
    assert loss.item() == pytest.approx(expected / 4, abs=1e-5)
    loss.backward()
    expected = torch.tensor([[-2, -2.4, -1.6], [0.8, 0, 0]]) / 4
    torch.testing.assert_close(values.grad, expected)
    assert metrics['clip_ratio/high_mean'].item() == pytest.approx(1 / 4)


def test_cispo_without_a_lower_end():
    values = logps()
    options = {**OPTIONS, 'epsilon_low': 1.0, 'reduction': 'bnpo', 'surrogate': 'cispo'}
    grpo_loss(values, OLD, None, ADVANTAGES, MASK, **options)[0].backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-2, -2.4, -1.0], [0.5, 0, 0]]) / 4)


def test_sapo_by_hand():
    """(4/tau) sigmoid(tau (rho - 1)) A, of slope 4 s (1 - s) rho A in log pi; A is 2 and -1."""
    values = logps()
    options = {**OPTIONS, 'reduction': 'bnpo', 'surrogate': 'sapo', 'sapo_temperature_neg': 2.0}
    loss, _ = grpo_loss(values, OLD, None, ADVANTAGES, MASK, **options)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    up, low, negative = sigmoid(0.5), sigmoid(-0.5), sigmoid(-1.0)
    expected = -2 * 4 * (0.5 + up + low) + 2 * negative
    assert loss.item() == pytest.approx(expected / 4, abs=1e-6)
    loss.backward()

    def slope(s, rho):
        return 4 * s * (1 - s) * rho

    first = [-2.0, -2 * slope(up, 1.5), -2 * slope(low, 0.5)]
    expected = torch.tensor([first, [slope(negative, 0.5), 0.0, 0.0]]) / 4
    torch.testing.assert_close(values.grad, expected)


@pytest.mark.parametrize('surrogate', ['clip', 'cispo', 'sapo'])
def test_on_policy_all_surrogates_have_one_gradient(surrogate):
    values = torch.full((2, 3), -2.0, requires_grad=True)
    options = {**OPTIONS, 'reduction': 'bnpo', 'surrogate': surrogate}
    grpo_loss(values, None, None, ADVANTAGES, MASK, **options)[0].backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-2.0, -2, -2], [1, 0, 0]]) / 4)


def test_an_unknown_surrogate_is_named():
    with pytest.raises(
        ValueError, match="surrogate='ppo' is unknown: use one of clip, cispo, sapo"
    ):
        grpo_loss(logps(), OLD, None, ADVANTAGES, MASK, **OPTIONS, surrogate='ppo')


def test_tokens_of_the_highest_entropy():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    entropy = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, math.nan]])
    # Of 1 … 5 the upper fifth begins at the 0.8 quantile, 4.2; two fifths at 3.4.
    assert top_entropy_mask(entropy, mask, 0.2).tolist() == [[False, True, False], [False] * 3]
    assert top_entropy_mask(entropy, mask, 0.4).sum() == 2
    assert torch.equal(top_entropy_mask(entropy, mask, 1.0), mask)
    assert not top_entropy_mask(entropy, torch.zeros_like(mask), 0.5).any()


def test_other_tokens_keep_their_kl_and_their_place_in_the_mean():
    values = logps()
    options = {**OPTIONS, 'beta': 1.0, 'reduction': 'bnpo'}
    chosen = torch.tensor([[1, 0, 0], [1, 0, 0]])
    ref = values.detach() - math.log(2)
    loss, _ = grpo_loss(values, OLD, ref, ADVANTAGES, MASK, **options, policy_mask=chosen)
    # d = -log 2, k3 = 1/2 + log 2 - 1 of all four tokens; the policy terms of two.
    assert loss.item() == pytest.approx((-2 + 0.8) / 4 + math.log(2) - 0.5, abs=1e-6)
