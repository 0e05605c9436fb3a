"""Weights and optimizer states go from one ZeRO stage and number of ranks to another, exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from torch import Tensor, nn

from projects.llava_sam2_rl.engine.launch import prepare

ROOT = Path(__file__).resolve().parents[2]
STAGES = (1, 2, 3)


class Toy(nn.Module):
    """Sizes that no number of ranks divides, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(5, 5)
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3, bias=False)
        self.frozen.requires_grad_(False)
        self.objective = None

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.frozen(x)))).pow(2).mean()


def engine(stage: int, dtype: str = 'fp32') -> Any:
    import deepspeed

    from projects.llava_sam2_rl.engine.deepspeed import DualLoopEngine

    suffix = '_fp32' if dtype == 'fp32' else ''
    config = json.loads((ROOT / f'configs/deepspeed/zero{stage}{suffix}.json').read_text())
    config.update(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=0.0
    )
    toy = Toy()
    groups = [
        dict(params=list(toy.first.parameters()), lr=0.03),
        dict(params=list(toy.second.parameters()), lr=0.01),
    ]
    made, *_ = deepspeed.initialize(model=toy, optimizer=torch.optim.AdamW(groups), config=config)
    return DualLoopEngine(model=made)


def step(wrapped: Any, number: int) -> None:
    """One step on data that is the same on all ranks."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 5, generator=generator).to(wrapped.model.module.second.weight.dtype)
    wrapped.backward(wrapped(x))
    wrapped.step()


def taken(wrapped: Any) -> dict[str, Any]:
    from projects.llava_sam2_rl.engine.zero_state import full_weights, optimizer_state

    return {
        'weights': full_weights(wrapped.model.module, keep=True),
        'optimizer': optimizer_state(wrapped.model, keep=True),
    }


def put(wrapped: Any, state: dict[str, Any]) -> None:
    from projects.llava_sam2_rl.engine.zero_state import load_optimizer_state, load_weights

    load_weights(wrapped.model, state['weights'])
    load_optimizer_state(wrapped.model, state['optimizer'])


def go_on(rank: int, ranks: int, state: dict[str, Any] | None) -> dict[str, Any]:
    """Trains two steps, and moves the state through every stage; or takes it up in every stage."""
    prepare('pytorch', 'a.json')
    found: dict[str, Any] = {}
    for dtype in ('fp32', 'bf16'):
        if state is None:
            wrapped = engine(2, dtype)
            for number in range(2):
                step(wrapped, number)
            start = taken(wrapped)
            found[f'{dtype} start'] = start
            step(wrapped, 2)
            found[f'{dtype} 2'] = taken(wrapped)
        else:
            start = state[f'{dtype} start']
        for stage in STAGES:
            wrapped = engine(stage, dtype)
            put(wrapped, start)
            found[f'{dtype} {stage} loaded'] = taken(wrapped)
            step(wrapped, 2)
            found[f'{dtype} {stage}'] = taken(wrapped)
    return found


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            same(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def by_hand() -> dict[str, Tensor]:
    """Three steps of AdamW without DeepSpeed."""
    toy = Toy()
    optimizer = torch.optim.AdamW(
        [
            dict(params=list(toy.first.parameters()), lr=0.03),
            dict(params=list(toy.second.parameters()), lr=0.01),
        ]
    )
    for number in range(3):
        optimizer.zero_grad()
        toy(torch.randn(4, 5, generator=torch.Generator().manual_seed(number))).backward()
        optimizer.step()
    return {name: p.detach() for name, p in toy.named_parameters() if p.requires_grad}


def test_any_stage_and_number_of_ranks_goes_on_exactly(tmp_path):
    two, other = run_ranks(go_on, 2, tmp_path / 'two', 2, None)
    same(two, other)
    (one,) = run_ranks(go_on, 1, tmp_path / 'one', 1, two)
    three = run_ranks(go_on, 3, tmp_path / 'three', 3, two)[2]
    for dtype in ('fp32', 'bf16'):
        start = two[f'{dtype} start']
        assert set(start['optimizer']['state']) == set(start['weights']) == set(by_hand())
        assert start['optimizer']['state']['first.bias']['step'] == 2
        assert [group['lr'] for group in start['optimizer']['param_groups']] == [0.03, 0.01]
        wanted = two[f'{dtype} 2']
        # bfloat16 rounds the sum of the ranks' gradients, by their number.
        atol = 1e-6 if dtype == 'fp32' else 1e-3
        for found in (one, two, three):
            for stage in STAGES:
                same(found[f'{dtype} {stage} loaded'], start)
                for name, value in found[f'{dtype} {stage}']['weights'].items():
                    torch.testing.assert_close(value, wanted['weights'][name], rtol=0, atol=atol)
    for name, value in by_hand().items():
        torch.testing.assert_close(two['fp32 3']['weights'][name], value, rtol=0, atol=1e-6)
    # Masters keep what bfloat16 rounds away.
    master = two['bf16 start']['weights']['first.weight']
    assert not torch.equal(master, master.bfloat16().float())


def test_optimizer_states_change_between_names_and_indices():
    from projects.llava_sam2_rl.engine.zero_state import by_index, by_name
    from projects.llava_sam2_rl.utils.errors import CheckpointError

    toy = Toy()
    optimizer = torch.optim.AdamW(toy.parameters(), lr=0.01)
    toy(torch.ones(1, 5)).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    named = by_name(saved, list(toy.named_parameters()))
    assert set(named['state']) == {'first.weight', 'first.bias', 'second.weight'}
    assert named['state']['second.weight']['exp_avg'].shape == (3, 7)
    other = torch.optim.AdamW(toy.parameters(), lr=0.5)
    other.load_state_dict(by_index(named, other, toy))
    same(other.state_dict(), saved)
    with pytest.raises(CheckpointError, match='over 5 parameters, the model has 1'):
        by_name(saved, list(toy.second.named_parameters()))
    two = torch.optim.AdamW([{'params': [p]} for p in toy.parameters()])
    with pytest.raises(CheckpointError, match='has 1 parameter groups'):
        by_index(named, two, toy)
