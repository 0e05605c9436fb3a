"""Packed rows give what each sequence gives alone, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from projects.llava_sam2_rl.models import prefix_tree
from projects.llava_sam2_rl.models.prefix_tree import PrefixTree
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel

#: Two trees: parent of each node and its length. The second node of the first tree is inner too.
PARENTS = [None, 0, 1, 1, 0, None, 5, 5]
LENGTHS = [5, 3, 4, 1, 2, 3, 2, 6]


def forest(policy, seed=0):
    torch.manual_seed(seed)
    width = policy.language_model.get_input_embeddings().weight.shape[1]
    embeds = [torch.randn(n, width).mul_(0.3).requires_grad_() for n in LENGTHS]
    tree = PrefixTree()
    for x, parent in zip(embeds, PARENTS, strict=True):
        tree.add_node(x, parent)
    return tree, embeds


def chain(node):
    return [] if node is None else [*chain(PARENTS[node]), node]


def alone(policy, embeds, node):
    """By a plain pass over the node and all before it."""
    sequence = torch.cat([embeds[n] for n in chain(node)])[None]
    mask = torch.ones(sequence.shape[:2], dtype=torch.bool)
    return policy.hidden_states(sequence, mask)[0, -LENGTHS[node] :]


def assert_equal_to_alone(policy):
    tree, embeds = forest(policy)
    found = tree.forward(policy)
    expected = [alone(policy, embeds, node) for node in range(len(LENGTHS))]
    weights = [torch.randn_like(x) for x in found]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(way, weights)), embeds)
        for way in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_a_forest_equals_its_sequences_one_by_one(tiny_loop):
    assert_equal_to_alone(tiny_loop.policy.eval())


def test_long_trees_are_spread_over_rows(tiny_loop, monkeypatch):
    monkeypatch.setattr(prefix_tree, 'MAX_ROW', 12)
    tree, _ = forest(tiny_loop.policy)
    # Of the first tree 5+3+4 = 12 fill a row, the rest repeats what stands before it; of the
    # second 3+2+6 = 11 fit in one.
    assert tree._rows(LENGTHS) == [[0, 1, 2], [0, 1, 3, 4], [5, 6, 7]]
    assert_equal_to_alone(tiny_loop.policy.eval())


def test_short_trees_share_a_row():
    tree = PrefixTree()
    for length in (9, 4, 5, 2):
        tree.add_node(torch.zeros(length, 1))
    assert tree._rows([9, 4, 5, 2]) == [[0], [2, 1], [3]]


def test_a_chunk_longer_than_a_row_has_one_of_its_own(monkeypatch):
    monkeypatch.setattr(prefix_tree, 'MAX_ROW', 4)
    tree = PrefixTree()
    root = tree.add_node(torch.zeros(6, 1))
    tree.add_node(torch.zeros(3, 1), root)
    tree.add_node(torch.zeros(2, 1), root)
    assert tree._rows([6, 3, 2]) == [[0, 1], [0, 2]]


def test_an_empty_node_is_refused():
    with pytest.raises(ValueError, match='a token at least'):
        PrefixTree().add_node(torch.zeros(0, 4))


@pytest.mark.parametrize('name', ['Qwen2ForCausalLM', 'Phi3ForCausalLM', 'InternLM2ForCausalLM'])
def test_every_language_model(tiny_config, name):
    config = dict(tiny_config.model.policy)
    config.pop('type')
    sizes = dict(config['llm_config'], architectures=[name], pad_token_id=0)
    sizes['model_type'] = {'Q': 'qwen2', 'P': 'phi3', 'I': 'internlm2'}[name[0]]
    config.update(llm_config=sizes, pretrained=None, lora=None)
    config['tokenizer'] = 'llava_sam2_rl://assets/sa2va_tiny'
    torch.manual_seed(0)
    assert_equal_to_alone(VideoLLaVASAMModel(**config).eval())
