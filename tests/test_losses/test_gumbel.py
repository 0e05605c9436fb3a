import math

import pytest
import torch

from projects.llava_sam2_rl.engine.memory import peak_extra_bytes
from projects.llava_sam2_rl.losses import gumbel_embeds, length_weights, mask_tokens


def reference(logits, table, tau, k, noise):
    """The plain version with the full (..., k, D) gather."""
    values, ids = logits.topk(k)
    soft = ((values + noise) / tau).softmax(-1)
    picked = soft.argmax(-1, keepdim=True)
    hard = torch.zeros_like(soft).scatter_(-1, picked, 1.0)
    weights = hard - soft.detach() + soft
    embeds = torch.einsum('...k,...kd->...d', weights, table[ids])
    return embeds, ids.gather(-1, picked)[..., 0]


def problem(lead=(3, 7), vocab=50, width=6, k=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(*lead, vocab, generator=generator, dtype=dtype).requires_grad_()
    table = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    noise = -torch.rand(*lead, k, generator=generator, dtype=dtype).log().neg().log()
    upstream = torch.randn(*lead, width, generator=generator, dtype=dtype)
    return logits, table, noise, upstream


@pytest.mark.parametrize('lead', [(3, 7), (21,), (2, 2, 60)])
@pytest.mark.parametrize('tau', [0.3, 1.0, 2.5])
def test_equals_the_plain_reference(lead, tau):
    logits, table, noise, upstream = problem(lead)
    embeds, ids = reference(logits, table, tau, 9, noise)
    expected = torch.autograd.grad((embeds * upstream).sum(), (logits, table))
    fast, fast_ids = gumbel_embeds(logits, table, tau=tau, top_k=9, noise=noise)
    actual = torch.autograd.grad((fast * upstream).sum(), (logits, table))
    assert torch.equal(fast_ids, ids)
    assert torch.equal(fast, table[ids])
    torch.testing.assert_close(fast, embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)
    # The reference also moves rows whose weights cancel to 0 in value, hence a tolerance.
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-5)
    assert actual[0].abs().sum() > 0


def test_full_vocabulary_equals_torchs_gumbel_softmax():
    logits, table, noise, upstream = problem(k=50)
    order = logits.argsort(-1, descending=True)
    in_place = torch.zeros_like(noise).scatter_(-1, order, noise)
    soft = (logits + in_place).softmax(-1)
    expected = torch.autograd.grad(((soft @ table) * upstream).sum(), logits)[0]
    embeds, ids = gumbel_embeds(logits, table, tau=1.0, top_k=50, noise=noise)
    assert torch.equal(ids, (logits + in_place).argmax(-1))
    actual = torch.autograd.grad((embeds * upstream).sum(), logits)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_half_precision_and_larger_table():
    logits, table, _, _ = problem()
    table = torch.cat([table, torch.zeros(4, 6)]).bfloat16().detach().requires_grad_()
    logits = logits.detach().bfloat16().requires_grad_()
    embeds, ids = gumbel_embeds(logits, table, tau=1.0, top_k=9)
    assert embeds.dtype == torch.bfloat16
    assert torch.equal(embeds, table[ids])
    embeds.float().pow(2).sum().backward()
    assert logits.grad.dtype == table.grad.dtype == torch.bfloat16
    assert logits.grad.isfinite().all()


def test_zero_noise_is_greedy_and_suppressed_tokens_stay_out():
    logits, table, noise, _ = problem()
    with torch.no_grad():
        logits[..., :45] = -torch.inf
    embeds, ids = gumbel_embeds(logits, table, tau=0.5, top_k=9, noise=torch.zeros_like(noise))
    assert torch.equal(ids, logits.argmax(-1))
    embeds.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[..., :45].abs().sum() == 0
    assert logits.grad[..., 45:].abs().sum() > 0


def test_frequencies_follow_the_softmax_of_the_top_k():
    draws, k = 100_000, 5
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])
    torch.manual_seed(0)
    _, ids = gumbel_embeds(logits.expand(draws, -1), torch.eye(7), tau=1.0, top_k=k)
    weights = [math.exp(value) for value in logits.tolist()[:k]]
    counts = torch.bincount(ids, minlength=7).tolist()
    assert counts[k:] == [0, 0]
    for count, weight in zip(counts, weights):
        p = weight / sum(weights)
        assert abs(count / draws - p) <= 4 * math.sqrt(p * (1 - p) / draws)


def test_noise_is_fresh_each_time():
    logits, table = torch.zeros(1, 200, 30), torch.eye(30)
    first = gumbel_embeds(logits, table, tau=1.0, top_k=30)[1]
    assert not torch.equal(first, gumbel_embeds(logits, table, tau=1.0, top_k=30)[1])


def test_extra_memory_is_twelve_bytes_per_candidate():
    tokens, vocab, width, k = 256, 4000, 64, 512
    logits = torch.randn(2, tokens // 2, vocab, requires_grad=True)
    table = torch.randn(vocab, width)
    upstream = torch.randn(2, tokens // 2, width)

    def run():
        embeds, ids = gumbel_embeds(logits, table, tau=1.0, top_k=k)
        embeds.backward(upstream)
        return embeds, ids

    outputs = tokens * width * 4 + tokens * 8 + logits.nbytes  # embeds, ids, gradient
    assert peak_extra_bytes(run) - outputs <= tokens * k * 12


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'tau': 0.0}, 'tau must be positive, got 0.0'),
        ({'tau': -1.0}, 'tau'),
        ({'tau': math.nan}, 'tau'),
        ({'top_k': 51}, 'top_k=51 .* 50'),
        ({'top_k': 0}, 'top_k=0'),
        ({'noise': torch.zeros(3, 7, 8)}, r'\(3, 7, 8\), expected \(3, 7, 9\)'),
        ({'embedding_weight': torch.zeros(49, 6)}, r'\(49, 6\) .* 50 logits'),
    ],
)
def test_bad_input_is_named(change, words):
    logits, table, noise, _ = problem()
    arguments = {
        'logits': logits,
        'embedding_weight': table,
        'tau': 1.0,
        'top_k': 9,
        'noise': noise,
        **change,
    }
    with pytest.raises(ValueError, match=words):
        gumbel_embeds(**arguments)


def test_mask_tokens_replaces_the_share_of_each_row():
    tokens = torch.arange(100, 140).repeat(3, 1)
    valid = torch.zeros(3, 40, dtype=torch.bool)
    valid[0, :40] = valid[1, 10:30] = True
    before = tokens.clone()
    allowed = torch.tensor([3, 5, 7])
    out = mask_tokens(tokens, valid, 0.25, allowed, torch.Generator().manual_seed(0))
    changed = out != tokens
    assert torch.equal(tokens, before)
    assert changed.sum(1).tolist() == [10, 5, 0]
    assert not (changed & ~valid).any()
    assert set(out[changed].tolist()) == {3, 5, 7}


def test_mask_tokens_is_right_on_average_for_short_rows():
    tokens = torch.full((20_000, 2), 9)
    out = mask_tokens(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        0.25,
        torch.arange(9),
        torch.Generator().manual_seed(0),
    )
    changed = out != tokens
    # one of two tokens in half of the rows: standard error 0.5 / sqrt(20000)
    assert abs(changed.any(1).double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(20_000)
    counts = torch.bincount(out[changed], minlength=9).double()
    expected = changed.sum().item() / 9
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # chi-square, 8 d.o.f., p = 0.001


def test_mask_tokens_always_differs_and_stays_uniform():
    tokens = torch.full((1, 30_000), 2)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    out = mask_tokens(tokens, valid, 1.0, torch.arange(4), torch.Generator().manual_seed(3))
    counts = torch.bincount(out[0], minlength=4)
    assert counts[2] == 0
    for index in (0, 1, 3):
        assert abs(counts[index].item() - 10_000) < 4 * math.sqrt(30_000 * 2 / 9)


def test_mask_tokens_repeats_with_its_generator():
    tokens, valid = torch.zeros(2, 50, dtype=torch.int64), torch.ones(2, 50, dtype=torch.bool)
    draw = [
        mask_tokens(tokens, valid, 0.5, torch.arange(1, 99), torch.Generator().manual_seed(s))
        for s in (4, 4, 5)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert torch.equal(mask_tokens(tokens, valid, 0.0, torch.arange(9)), tokens)


@pytest.mark.parametrize(
    ('ratio', 'valid', 'allowed', 'words'),
    [
        (1.5, torch.ones(1, 4), torch.arange(3), 'mask_ratio'),
        (0.5, torch.ones(1, 3), torch.arange(3), r'valid \(1, 3\)'),
        (0.5, torch.ones(1, 4), torch.arange(0), 'A >= 1'),
    ],
)
def test_mask_tokens_bad_input(ratio, valid, allowed, words):
    with pytest.raises(ValueError, match=words):
        mask_tokens(torch.zeros(1, 4, dtype=torch.int64), valid, ratio, allowed)


# -- length --------------------------------------------------------------------------------------


def test_one_token_costs_its_integral():
    log_end = torch.tensor([math.log(0.25)], dtype=torch.float64, requires_grad=True)
    weights = length_weights(log_end, torch.Generator().manual_seed(0))
    g = float(weights.detach())
    assert 0 < g < 1
    (3 * weights**2).sum().backward()
    # dL/dg = 6 g; Z = e = 0.25; d/dlog e = -Z dL/dg.
    assert log_end.grad.tolist() == pytest.approx([-0.25 * 6 * g])


def test_the_gradient_is_that_of_the_expected_loss():
    ends = torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64)
    # The loss of weights w, and so of the first 0, 1, 2 and 3 tokens: 1, 4, 0.25, 2.25.
    price = torch.tensor([1.0, -1.5, 1.0], dtype=torch.float64)
    prefixes = [1.0, 4.0, 0.25, 2.25]
    # a = 1, 0.8, 0.4; a_t e_t (L_t - L_3).
    expected = [0.2 * (1 - 2.25), 0.8 * 0.5 * (4 - 2.25), 0.4 * 0.1 * (0.25 - 2.25)]
    generator = torch.Generator().manual_seed(0)
    log_ends = ends.log().requires_grad_()
    found = []
    for _ in range(20_000):
        loss = (1 + (length_weights(log_ends, generator) * price).sum()) ** 2
        found.append(torch.autograd.grad(loss, log_ends)[0])
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert prefixes[-1] == (1 + float(price.sum())) ** 2
    assert ((found.mean(0) - torch.tensor(expected)).abs() < 4 * error).all()
    assert (error < 0.02).all()


def test_weights_fall_behind_one_place_and_stay():
    generator = torch.Generator().manual_seed(0)
    log_ends = torch.tensor([0.3, 0.3, 0.3]).log()
    rows = torch.stack([length_weights(log_ends, generator) for _ in range(100)])
    assert ((rows > 0) & (rows <= 1)).all()
    falls = (rows < 1).int()
    assert (falls.diff(dim=1) >= 0).all()
    assert falls.sum(1).unique().tolist() == [1, 2, 3]
    assert all(len(row[row < 1].unique()) == 1 for row in rows)


@pytest.mark.parametrize('value', [float('-inf'), 0.0])
def test_a_certain_and_an_impossible_end_have_finite_gradients(value):
    log_ends = torch.full((2,), value, requires_grad=True)
    weights = length_weights(log_ends)
    if value:
        assert weights.tolist() == [1, 1]
    (weights.sum() + log_ends.clamp(min=-1).sum()).backward()
    assert log_ends.grad.isfinite().all()


def test_length_needs_a_vector():
    with pytest.raises(ValueError, match=r'must be \(T,\), T >= 1, got \(0,\)'):
        length_weights(torch.zeros(0))
