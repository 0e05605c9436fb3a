"""The short ways of decoding give what the layers themselves give."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from projects.llava_sam2_rl.models.decoding import (
    SequenceEnds,
    StopWatcher,
    direct_linears,
    few_rows_linear,
)


@pytest.mark.parametrize('shape', [(1, 6), (2, 6), (3, 1, 6), (8, 6), (5, 7, 6)])
@pytest.mark.parametrize('with_bias', [True, False])
def test_a_product_by_its_definition(shape, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(4, 6)
    bias = torch.randn(4) if with_bias else None
    down, up = torch.randn(2, 6), torch.randn(4, 2)
    expected = torch.einsum('...k,nk->...n', x, weight) + (0 if bias is None else bias)
    found = few_rows_linear(x, weight, bias)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()
    found = few_rows_linear(x, weight, bias, (down, up, 0.5))
    low = torch.einsum('...k,rk->...r', x, down)
    torch.testing.assert_close(found, expected + 0.5 * torch.einsum('...r,nr->...n', low, up))


def test_an_adapter_of_higher_precision_keeps_it():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    down, up = torch.randn(4, 64), torch.randn(5, 4)
    found = few_rows_linear(x, weight, None, (down, up, 2.0))
    expected = nn.functional.linear(x, weight) + 2.0 * (x.float() @ down.T @ up.T)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


@pytest.fixture
def language_model(tiny_model):
    model = tiny_model.policy.language_model.eval()
    for name, parameter in model.named_parameters():
        if 'lora_B' in name:  # zero at the start
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def test_layers_of_peft_and_the_head(language_model):
    lora = [m for m in language_model.modules() if isinstance(m, LoraLinear)]
    head = language_model.get_output_embeddings()
    x = torch.randn(4, 1, 128)
    layers = [m for m in lora if m.in_features == 128] + [head]
    expected = [layer(x) for layer in layers]
    with direct_linears(language_model):
        assert all('forward' in vars(m) for m in lora)
        for layer, value in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer(x), value, atol=1e-5, rtol=1e-4)
    assert not any('forward' in vars(m) for m in language_model.modules())


def test_what_peft_does_more_than_the_formula_is_left_to_it(language_model):
    (layer, *_) = [m for m in language_model.modules() if isinstance(m, LoraLinear)]
    for change, back in (
        (lambda: layer.train(), lambda: layer.eval()),
        (lambda: layer.enable_adapters(False), lambda: layer.enable_adapters(True)),
        (lambda: layer.merge(), lambda: layer.unmerge()),
    ):
        change()
        with direct_linears(layer):
            assert 'forward' not in vars(layer)
        back()
        with direct_linears(layer):
            assert 'forward' in vars(layer)


def test_layers_are_themselves_again_after_an_error(language_model):
    with pytest.raises(ZeroDivisionError), direct_linears(language_model):
        raise ZeroDivisionError
    assert not any('forward' in vars(m) for m in language_model.modules())


def test_where_sequences_end(tiny_model):
    tokenizer = tiny_model.policy.tokenizer
    words = tokenizer.encode(' a red circle on the left', add_special_tokens=False)
    watcher = StopWatcher(tokenizer, ['red circle'], [7])
    assert watcher.width == len('red circle')
    end = next(n for n in range(len(words)) if 'red circle' in tokenizer.decode(words[: n + 1]))
    assert watcher.first_end(words, 0) == end
    assert watcher.first_end([*words[:2], 7, 7], 0) == 2
    assert watcher.first_end([], 0) is None

    # Three sequences of which the second is looked at no more, in looks of two tokens and of the
    # rest: the text of the first begins before a look and ends behind it.
    other = tokenizer.encode(' the', add_special_tokens=False)[0]
    rest = len(words) - 2
    ids = torch.tensor([words, [other, 7, *[9] * rest], [other] * len(words)])
    ends = SequenceEnds(watcher, 3)
    assert ends.look(ids[:, :2], torch.tensor([0, 1, 2]), [0, 1, 2]) == [0, 2]
    assert ends.lengths == [None, 2, None]
    assert ends.look(ids, torch.tensor([0, 2]), [0, 2]) == [1]
    assert ends.lengths == [end + 1, 2, None]
