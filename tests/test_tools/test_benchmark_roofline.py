"""What a decode step must read and a training pass must compute, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn


@pytest.fixture
def roofline(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools'))
    from benchmarks import roofline

    return roofline


class Language(nn.Module):
    """Two layers of width 8 with two heads, of which one has keys and values; 10 words."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2
        )
        self.table = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

    def get_input_embeddings(self):
        return self.table


def policy(tied):
    language = Language()
    head = nn.Linear(8, 10, bias=False)
    if tied:
        head.weight = language.table.weight
    return SimpleNamespace(language_model=language, lm_head=head)


@pytest.mark.parametrize('tied', [False, True])
def test_bytes_of_a_rollout(roofline, tied):
    # Keys and values: 2 layers, 1 head of 4 numbers each, 4 bytes.
    position = 2 * 2 * 4 * 4
    assert roofline.bytes_of_a_position(policy(tied)) == position
    # 3 steps, of which each reads the layers and the output embedding, tied or not, and the prompt
    # of 5 tokens once for both completions. These read 1 + 2 + 3 and 1 of their own.
    weights = 4 * (2 * 64 + 80)
    expected = 3 * weights + (3 * 5 + 6 + 1) * position
    assert roofline.decode_bytes(policy(tied), 1, 5, torch.tensor([3, 1])) == expected


def test_peak_is_what_the_fastest_try_gave(roofline, monkeypatch):
    monkeypatch.setattr(roofline, '_SIDE', {'cpu': 4})
    monkeypatch.setattr(roofline, '_BYTES', {'cpu': 64})
    clock = iter([0, 9, 10, 12, 20, 24, 30, 30.5, 31, 39, 40, 48])
    monkeypatch.setattr(roofline.time, 'perf_counter', lambda: next(clock))
    peak = roofline.measure_peak('cpu', torch.float32, tries=2)
    # Seconds 9, 2, 4 of the product and 0.5, 8, 8 of the reading.
    assert peak == roofline.Peak(flops=2 * 64 / 2, bandwidth=64 / 0.5)


class Model(nn.Module):
    """A product with a gradient for both sides, behind a checkpointed one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.first.gradient_checkpointing = True

    def encode(self, data, names):
        return data

    def rollout(self, batch):
        return {}

    def forward(self, batch, rollouts, mode):
        hidden = self.first(batch)
        if self.first.gradient_checkpointing:
            hidden = torch.utils.checkpoint.checkpoint(self.first, batch, use_reentrant=False)
        return {'loss': SimpleNamespace(value=self.second(hidden).sum())}, {}


def test_operations_of_a_pass_leave_out_what_is_repeated(roofline):
    model = Model()
    batch = {'data': torch.ones(2, 4), 'data_samples': []}
    done = roofline.training_pass(model, batch, 1, 'cpu')
    # 2 x 4 times 4 x 4 is 64 operations: two products forward, and backward the gradients of both
    # weights and of what lies between.
    assert done.flops == 5 * 64
    assert done.seconds > 0
    assert model.first.gradient_checkpointing
