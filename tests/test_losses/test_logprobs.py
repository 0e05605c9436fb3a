import pytest
import torch

from projects.llava_sam2_rl.engine.memory import peak_extra_bytes
from projects.llava_sam2_rl.losses import chunked_logprobs

SHAPE = (2, 5)
WIDTH, VOCAB = 6, 37


def problem(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*SHAPE, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(VOCAB, generator=generator).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(VOCAB, SHAPE, generator=generator)
    upstream = torch.randn(2, *SHAPE, generator=generator)
    return hidden, weight, offset, targets, upstream


def plain(hidden, weight, bias, targets, temperature):
    logits = torch.nn.functional.linear(hidden, weight, bias).float() / temperature
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, targets[..., None])[..., 0], entropy


@pytest.mark.parametrize('chunk_size', [1, 3, 10, 64])
@pytest.mark.parametrize('temperature', [1.0, 0.6])
@pytest.mark.parametrize('with_entropy', [False, True])
def test_equals_plain_in_value_and_gradient(chunk_size, temperature, with_entropy):
    hidden, weight, bias, targets, upstream = problem()
    expected = plain(hidden, weight, bias, targets, temperature)
    parts = 2 if with_entropy else 1
    total = sum((upstream[i] * expected[i]).sum() for i in range(parts))
    expected_grads = torch.autograd.grad(total, (hidden, weight, bias))

    actual = chunked_logprobs(
        hidden,
        weight,
        bias,
        targets=targets,
        temperature=temperature,
        chunk_size=chunk_size,
        return_entropy=with_entropy,
    )
    actual = actual if with_entropy else (actual,)
    for i in range(parts):
        torch.testing.assert_close(actual[i], expected[i], rtol=0, atol=1e-5)
    total = sum((upstream[i] * actual[i]).sum() for i in range(parts))
    grads = torch.autograd.grad(total, (hidden, weight, bias))
    for grad, other in zip(grads, expected_grads):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('chunk_size', [1, 3, 64])
@pytest.mark.parametrize('temperature', [1.0, 0.6])
@pytest.mark.parametrize('with_bias', [False, True])
def test_a_frozen_head_gives_the_same_gradient(chunk_size, temperature, with_bias):
    hidden, weight, bias, targets, upstream = problem()
    weight, bias = weight.detach(), bias.detach() if with_bias else None
    expected = plain(hidden, weight, bias, targets, temperature)[0]
    expected_grad = torch.autograd.grad((upstream[0] * expected).sum(), hidden)[0]
    actual = chunked_logprobs(
        hidden, weight, bias, targets=targets, temperature=temperature, chunk_size=chunk_size
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    grad = torch.autograd.grad((upstream[0] * actual).sum(), hidden)[0]
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_gradcheck_of_a_frozen_head():
    hidden, weight, _, targets, _ = problem(torch.float64, bias=False)
    assert torch.autograd.gradcheck(
        lambda h: chunked_logprobs(
            h, weight.detach(), targets=targets, temperature=0.8, chunk_size=4
        ),
        (hidden,),
    )


def test_gradcheck_in_float64():
    hidden, weight, bias, targets, _ = problem(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_logprobs(
            h, w, b, targets=targets, temperature=0.8, chunk_size=4, return_entropy=True
        ),
        (hidden, weight, bias),
    )


def test_frozen_weight_gets_no_gradient():
    hidden, weight, _, targets, _ = problem(bias=False)
    weight.requires_grad_(False)
    chunked_logprobs(hidden, weight, targets=targets).sum().backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_half_precision_softmax_is_float32():
    hidden, weight, _, targets, _ = problem(torch.bfloat16, bias=False)
    actual = chunked_logprobs(hidden, weight, targets=targets)
    expected, _ = plain(hidden, weight, None, targets, 1.0)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    actual.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_autocast_runs_the_product_in_half_precision():
    hidden, weight, _, targets, _ = problem(bias=False)
    expected, _ = plain(hidden.bfloat16(), weight.bfloat16(), None, targets, 1.0)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = chunked_logprobs(hidden, weight, targets=targets)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    actual.sum().backward()
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize('frozen', [False, True])
def test_masked_tokens_stay_clean_even_if_nan(frozen):
    hidden, weight, _, targets, _ = problem(bias=False)
    weight.requires_grad_(not frozen)
    dirty = hidden.detach().clone()
    dirty[1, 2:] = torch.nan
    dirty.requires_grad_()
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[1, 2:] = False
    for tensor in (hidden, dirty):
        logps = chunked_logprobs(tensor, weight, targets=targets)
        torch.where(mask, logps, 0.0).sum().backward()
    torch.testing.assert_close(dirty.grad, hidden.grad)
    assert dirty.grad[1, 2:].abs().sum() == 0
    assert frozen or weight.grad.isfinite().all()


def test_suppressed_tokens_by_bias():
    hidden, weight, _, targets, _ = problem(bias=False)
    bias = torch.zeros(VOCAB)
    bias[5] = -torch.inf
    kept = torch.arange(VOCAB) != 5
    targets = torch.full(SHAPE, 4)
    expected, expected_entropy = plain(hidden, weight[kept], None, targets, 1.0)
    logps, entropy = chunked_logprobs(hidden, weight, bias, targets=targets, return_entropy=True)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    expected_grad = torch.autograd.grad((expected + expected_entropy).sum(), hidden)[0]
    torch.testing.assert_close(
        torch.autograd.grad((logps + entropy).sum(), hidden)[0], expected_grad
    )


def test_no_tokens():
    hidden = torch.zeros(2, 0, WIDTH, requires_grad=True)
    weight = torch.zeros(VOCAB, WIDTH)
    logps = chunked_logprobs(hidden, weight, targets=torch.zeros(2, 0, dtype=torch.int64))
    logps.sum().backward()
    assert logps.shape == (2, 0)


@pytest.mark.parametrize('with_entropy', [False, True])
def test_peak_memory_is_at_most_a_quarter(with_entropy):
    batch, length, width, vocab = 4, 128, 8, 20_000
    hidden = torch.randn(batch, length, width, requires_grad=True)
    weight, targets = torch.randn(vocab, width), torch.randint(vocab, (batch, length))

    def run_plain():
        logps = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])
        logps.sum().backward()
        return logps

    def run_chunked():
        result = chunked_logprobs(hidden, weight, targets=targets, return_entropy=with_entropy)
        logps = sum(result) if with_entropy else result
        logps.sum().backward()
        return logps

    logits_bytes = batch * length * vocab * 4
    plain_peak = peak_extra_bytes(run_plain)
    chunked_peak = peak_extra_bytes(run_chunked)
    assert plain_peak > 2 * logits_bytes
    # One chunk of 256 tokens is half of the 512.
    assert chunked_peak <= logits_bytes / 2 * 1.01, (chunked_peak, plain_peak)
    assert chunked_peak <= plain_peak / 4


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'targets': torch.zeros(2, 4, dtype=torch.int64)}, r'targets \(2, 4\)'),
        ({'weight': torch.zeros(VOCAB, WIDTH + 1)}, r'D = 6, got \(37, 7\)'),
        ({'weight': torch.zeros(VOCAB, WIDTH, dtype=torch.float16)}, 'float16'),
        ({'temperature': 0.0}, 'temperature must be positive'),
        ({'chunk_size': 0}, 'chunk_size'),
    ],
)
def test_bad_input_is_named(change, words):
    hidden, weight, _, targets, _ = problem()
    with pytest.raises(ValueError, match=words):
        chunked_logprobs(**{'hidden': hidden, 'weight': weight, 'targets': targets, **change})


def test_an_entropy_without_gradient_changes_nothing_else():
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.randn(11, 6, dtype=torch.float64), torch.randint(11, (2, 7))
    upstream = torch.randn(2, 7, dtype=torch.float64)
    both = [
        chunked_logprobs(
            hidden, weight, targets=targets, temperature=0.7, chunk_size=3,
            return_entropy=True, entropy_gradient=flag,
        )
        for flag in (True, False)
    ]  # fmt: skip
    for ours, theirs in zip(both[1], both[0], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert both[0][1].requires_grad
    assert not both[1][1].requires_grad
    gradients = [torch.autograd.grad(logps, hidden, upstream)[0] for logps, _ in both]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs().max() > 0
