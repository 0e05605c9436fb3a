"""Steps replayed from graphs give the same tokens; where graphs do not work they are left.

There is no GPU here. `Recorder` stands for `torch.cuda.CUDAGraph` and does what it does: it keeps
the operations of a step with the very tensors and numbers they had, leaves memory as it was, and
repeats them at the same addresses.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from projects.llava_sam2_rl.models import decode_graph, generation
from projects.llava_sam2_rl.models.decode_graph import DecodeGraphs, StepGraphs
from projects.llava_sam2_rl.models.generation import Sampling, sample_completions
from projects.llava_sam2_rl.models.sa2va.self_test import _TinyModel


class Recorder(TorchDispatchMode):
    """Operations with their arguments and results; written tensors are put back by `undo`."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        writes = [
            x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments
        ]
        for written, value in zip(writes, args):
            if written and value.data_ptr() not in self.before:
                self.before[value.data_ptr()] = (value, value.clone())
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def undo(self):
        for value, content in reversed(list(self.before.values())):
            value.copy_(content)

    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def captured(monkeypatch):
    """Graphs on the CPU; the widths of what was captured."""
    widths = []

    def capture(step, pool):
        with Recorder() as recorder:
            out = step()
        recorder.undo()
        out.fill_(float('nan'))  # nothing is computed while it is captured
        widths.append(pool)
        return recorder.replay, out

    monkeypatch.setattr(decode_graph, 'capture', capture)
    monkeypatch.setattr(decode_graph, 'new_pool', lambda: len(widths))
    monkeypatch.setattr(
        DecodeGraphs,
        'for_rollout',
        lambda self, *_: None if self.choice == 'off' else StepGraphs(self),
    )
    return widths


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(decode_graph, 'print_log', lambda text, **_: lines.append(text))
    return lines


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return _TinyModel('Qwen2ForCausalLM')


def drawn(model, graphs, group=4, **options):
    torch.manual_seed(1)
    embeds = torch.randn(3, 7, 16)
    mask = torch.arange(7) >= torch.tensor([[0], [2], [4]])
    model.decode_graphs = graphs
    sampling = Sampling(stop_strings=(), temperature=0.8, **{'max_new_tokens': 30, **options})
    generator = torch.Generator().manual_seed(2)
    return sample_completions(model, embeds, mask, group, sampling, generator)


@pytest.mark.parametrize('architecture', ['Qwen2ForCausalLM', 'InternLM2ForCausalLM'])
@pytest.mark.parametrize('ends', [(), (3, 5)])
def test_replayed_steps_draw_the_same(architecture, ends, captured, said, monkeypatch):
    """Sequences that end leave the batch, and their room: those graphs are captured anew."""
    monkeypatch.setattr(decode_graph, 'WIDTH', 32)
    model = _TinyModel(architecture)
    alone = drawn(model, DecodeGraphs('off'), eos_token_id=ends)
    assert captured == []
    graphs = DecodeGraphs()
    replayed = drawn(model, graphs, eos_token_id=ends)
    assert graphs.work
    assert said == ['Decoding by CUDA graphs']
    assert torch.equal(alone.completion_ids, replayed.completion_ids)
    torch.testing.assert_close(alone.per_token_logps, replayed.per_token_logps)
    if not ends:
        # Of 7 + 4·t positions, t up to 29: widths 32, 64, 96 and 128, all in one pool.
        assert captured == [0] * 4
    else:
        assert len(set(alone.completion_mask.sum(1).tolist())) > 2
        assert 3 < len(captured) < 25


def test_a_second_rollout_captures_its_own(model, captured, said):
    graphs = DecodeGraphs()
    first = drawn(model, graphs)
    count = len(captured)
    model.language_model.get_input_embeddings().weight.data *= 1.5
    second = drawn(model, graphs)
    assert len(captured) == 2 * count == 2
    assert not torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(second.completion_ids, drawn(model, DecodeGraphs('off')).completion_ids)
    assert len(said) == 1


@pytest.mark.parametrize('broken', ['error', 'results', 'not finite', 'slow', 'later'])
def test_where_they_do_not_work_one_line_says_so(model, captured, said, broken, monkeypatch):
    monkeypatch.setattr(decode_graph, 'WIDTH', 32)
    alone = drawn(model, DecodeGraphs('off'))
    right, reason = decode_graph.capture, 'operation not permitted when stream is capturing'

    def capture(step, pool):
        if broken == 'error' or (broken == 'later' and len(captured) == 2):
            raise RuntimeError(f'CUDA error: {reason}\nand how to debug it')
        replay, out = right(step, pool)
        if broken in ('error', 'later', 'slow'):
            return replay, out
        worse = {'results': lambda: out.mul_(1.1), 'not finite': lambda: out.fill_(torch.nan)}
        return lambda: (replay(), worse[broken]()), out

    monkeypatch.setattr(decode_graph, 'capture', capture)
    if broken == 'slow':
        monkeypatch.setattr(decode_graph, '_PATIENCE', -1.0)
    graphs = DecodeGraphs()
    for _ in range(2):
        found = drawn(model, graphs)
        assert torch.equal(found.completion_ids, alone.completion_ids)
    expected = {
        'error': reason,
        'later': reason,
        'results': 'its results are 0.1 off',
        'not finite': 'its results are nan off',
        'slow': 'a capture took longer than -1 s',
    }
    assert graphs.work is False
    assert '\n' not in said[-1]
    assert said[-1].startswith('Decoding without CUDA graphs: ')
    assert expected[broken] in said[-1]
    assert len(said) == (2 if broken == 'later' else 1)


def test_on_a_cpu_and_where_it_is_off_there_are_none(model):
    cpu, gpu = torch.device('cpu'), torch.device('cuda')
    language_model = model.language_model
    assert DecodeGraphs().for_rollout(language_model, cpu) is None
    assert DecodeGraphs('off').for_rollout(language_model, gpu) is None
    assert DecodeGraphs().for_rollout(language_model, gpu) is not None
    with pytest.raises(ValueError, match="must be one of auto, off, got 'on'"):
        DecodeGraphs('on')


def test_weights_in_parts_are_not_captured(model, said):
    next(model.language_model.parameters()).ds_id = 0
    graphs = DecodeGraphs()
    for _ in range(2):
        assert graphs.for_rollout(model.language_model, torch.device('cuda')) is None
    assert said == ['Decoding without CUDA graphs: ZeRO-3 moves the weights']


def test_what_autocast_casts_inside_is_not_captured(model, captured, said, monkeypatch):
    """Its copies of weights would be the graph's."""
    monkeypatch.setattr(generation, 'fast_layers', lambda *_: generation.no_gradient())
    graphs = DecodeGraphs()
    with torch.autocast('cpu', torch.bfloat16):
        drawn(model, graphs, max_new_tokens=3)
    assert captured == []
    assert said == [
        'Decoding without CUDA graphs: autocast is on, and not all layers of this model are known'
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_a_gpu(model, said):
    model.language_model.cuda()
    torch.manual_seed(1)
    embeds = torch.randn(2, 300, 16, device='cuda')
    mask = torch.ones(2, 300, dtype=torch.bool, device='cuda')
    found = []
    for choice in ('off', 'auto'):
        model.decode_graphs = DecodeGraphs(choice)
        sampling = Sampling(max_new_tokens=100, greedy=True, stop_strings=(), eos_token_id=())
        found.append(sample_completions(model, embeds, mask, 4, sampling))
    assert model.decode_graphs.work, said
    assert torch.equal(found[0].completion_ids, found[1].completion_ids)
