"""One copy of a prompt for its group gives what a copy for each sequence gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from projects.llava_sam2_rl.models import generation, group_cache
from projects.llava_sam2_rl.models.generation import Sampling, sample_completions
from projects.llava_sam2_rl.models.group_cache import (
    GroupCache,
    folded_attention,
    sequences_in_a_row,
)
from projects.llava_sam2_rl.models.sa2va.self_test import _TinyModel
from projects.llava_sam2_rl.models.transformers_compat import PromptCache


@pytest.mark.parametrize(
    ('group', 'steps', 'expected'),
    [(1, 9000, 1), (8, 128, 8), (8, 256, 8), (8, 257, 4), (6, 900, 2), (6, 600, 3), (7, 500, 1)],
)
def test_a_group_shares_a_row_unless_its_completions_grow_too_long(group, steps, expected):
    assert sequences_in_a_row(group, steps) == expected


def plain_attention(query, keys, values):
    """By definition: ``(H, d)`` over ``(K, S, d)``, a key head for each H / K queries."""
    keys, values = (x.repeat_interleave(len(query) // len(x), 0) for x in (keys, values))
    scores = torch.einsum('hd,hsd->hs', query, keys) / query.shape[1] ** 0.5
    return torch.einsum('hs,hsd->hd', scores.softmax(-1), values)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_attention_step_by_step_and_after_sequences_left(dtype):
    """Two prompts, one padded on the left; three sequences each; two query heads to a key head."""
    torch.manual_seed(0)
    prompt_mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    prompts = PromptCache()
    prompts.update(*torch.randn(2, 2, 2, 5, 4).to(dtype), 0)
    cache = GroupCache(prompts, prompt_mask, torch.arange(2), 3, 6, folds=2, dtype=dtype)
    # What each of the six sequences holds, without padding.
    held = [
        [x[n // 3][:, prompt_mask[n // 3]] for x in (prompts.keys[0], prompts.values[0])]
        for n in range(6)
    ]
    sequences = list(range(6))
    leave = {2: [1, 3, 4], 4: [4]}  # before these steps: those that go on
    places = {2: [1, 0, 3, 4], 4: [3]}  # a row with one that goes on keeps another as well
    for step in range(6):
        if step in leave:
            at = [sequences.index(n) for n in leave[step]]
            assert set(at) <= set(places[step])
            kept = cache.keep(places[step])
            sequences = [sequences[place] for place in kept.tolist()]
        rows = len(sequences) // cache.slots
        query = torch.randn(rows, 4, cache.slots, 4).to(dtype)
        new = torch.randn(2, rows, 2, cache.slots, 4).to(dtype)
        bias = cache.next_bias()
        keys, values = cache.update(*new, 0)
        assert bias.shape == (rows, 1, 2 * cache.slots, keys.shape[2])
        assert keys.shape[2] % 16 == 0
        out, _ = folded_attention(None, query, keys, values, bias, scaling=0.5)
        cache.end_step()
        for place, n in enumerate(sequences):
            row, slot = divmod(place, cache.slots)
            held[n] = [torch.cat([x, y[row, :, slot, None]], 1) for x, y in zip(held[n], new)]
            expected = plain_attention(query[row, :, slot].float(), *(x.float() for x in held[n]))
            tolerance = 1e-6 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(
                out[row, slot].float(), expected, atol=tolerance, rtol=tolerance
            )
    assert sequences == [4]


def test_the_prompt_is_held_once():
    prompts = PromptCache()
    prompts.update(*torch.randn(2, 1, 2, 350, 8), 0)
    mask = torch.ones(1, 350, dtype=torch.bool)
    cache = GroupCache(prompts, mask, torch.zeros(1).long(), 8, 16, folds=1, dtype=torch.float32)
    positions = sum(x.numel() for x in cache.joint) / (2 * 2 * 8)
    assert 350 + 8 * 16 <= positions < 350 + 8 * 16 + 16


@pytest.mark.parametrize(
    'architecture', ['Qwen2ForCausalLM', 'Phi3ForCausalLM', 'InternLM2ForCausalLM']
)
@torch.no_grad()
def test_a_shared_prompt_changes_no_completion(architecture, monkeypatch):
    """Against rows of a single sequence, each with its own copy of the prompt."""
    model = _TinyModel(architecture)
    torch.manual_seed(1)
    embeds = torch.randn(3, 7, 16)
    mask = torch.arange(7) >= torch.tensor([[0], [2], [4]])
    options = Sampling(max_new_tokens=9, temperature=0.8, stop_strings=(), eos_token_id=(3, 5, 9))
    drawn = []
    for slots in (4, 2, 1):
        monkeypatch.setattr(group_cache, 'sequences_in_a_row', lambda *_, n=slots: n)
        # Nothing leaves, so that each draws the same numbers in all three.
        monkeypatch.setattr(generation, '_COMPACT_BELOW', 0.0)
        generator = torch.Generator().manual_seed(2)
        drawn.append(sample_completions(model, embeds, mask, 4, options, generator))
    assert len(set(drawn[0].completion_mask.sum(1).tolist())) > 2
    for other in drawn[1:]:
        assert torch.equal(drawn[0].completion_ids, other.completion_ids)
        torch.testing.assert_close(
            drawn[0].per_token_logps, other.per_token_logps, atol=1e-5, rtol=1e-5
        )


def test_an_attention_without_its_mask_would_be_noticed():
    """The bias is what keeps sequences of a row apart."""
    torch.manual_seed(0)
    query, keys = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    bias = torch.tensor([[0.0, 0.0, -1e30], [0.0, -1e30, 0.0]])[None, None]
    apart, _ = folded_attention(None, query, keys, keys, bias)
    together, _ = folded_attention(None, query, keys, keys, None)
    expected = F.softmax(query[0, 0, 1] @ keys[0, 0, [0, 2]].T / 2, -1) @ keys[0, 0, [0, 2]]
    torch.testing.assert_close(apart[0, 1, 0], expected)
    assert (apart - together).abs().max() > 1e-2
