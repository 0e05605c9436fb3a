"""Special tokens, padding, and where a text stops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from projects.llava_sam2_rl import prompts


def test_special_token_ids_are_the_contracts(tokenizer):
    assert prompts.special_token_ids(tokenizer) == {
        '<img>': 151665,
        '</img>': 151666,
        '<IMG_CONTEXT>': 151667,
        '[SEG]': 151674,
        '<p>': 151675,
        '</p>': 151676,
        '<vp>': 151677,
        '</vp>': 151678,
    }


def byte_tokenizer():
    """A byte-level tokenizer without merges, nothing to download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token='<eos>', pad_token='<pad>')


def test_missing_special_tokens_are_named_and_can_be_added():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(['<img>', '[SEG]'], special_tokens=True)
    with pytest.raises(ValueError, match=r'</img>, <IMG_CONTEXT>, <p>, </p>, <vp>, </vp>:'):
        prompts.special_token_ids(tokenizer)
    before = len(tokenizer)
    assert prompts.add_special_tokens(tokenizer) == 6
    ids = prompts.special_token_ids(tokenizer)
    assert len(tokenizer) == before + 6
    assert len(set(ids.values())) == 8


def test_counts_that_differ_are_refused_with_both_numbers():
    prompts.check_image_tokens([7, 7, 1], 7, 2, 'set/12')
    prompts.check_seg_tokens(torch.tensor([1, 9]), 9, 1, 'set/12')
    with pytest.raises(ValueError, match=r'set/12: 2 <IMG_CONTEXT> .* 3 embeddings'):
        prompts.check_image_tokens(torch.tensor([[7, 7, 1]]), 7, 3, 'set/12')
    with pytest.raises(ValueError, match=r'set/12: 0 \[SEG\] .* 1 masks'):
        prompts.check_seg_tokens([7, 7, 1], 9, 1, 'set/12')


def test_pad_batch_right():
    batch = prompts.pad_batch([[5, 6, 7], [8]], 0, 'right', labels=[[-100, 6, 7], [8]])
    assert batch['input_ids'].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch['attention_mask'].tolist() == [[True] * 3, [True, False, False]]
    assert batch['position_ids'].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch['labels'].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch['attention_mask'].dtype == torch.bool
    assert {batch[k].dtype for k in ('input_ids', 'position_ids', 'labels')} == {torch.int64}


def test_pad_batch_left_counts_positions_from_the_first_token():
    batch = prompts.pad_batch([[5, 6, 7], [8, 9]], 1, 'left')
    assert batch['input_ids'].tolist() == [[5, 6, 7], [1, 8, 9]]
    assert batch['attention_mask'].tolist() == [[True] * 3, [False, True, True]]
    assert batch['position_ids'].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert 'labels' not in batch


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (([[1]], 0, 'middle'), 'middle'),
        (([], 0, 'left'), 'at least one'),
        (([[1, 2]], 0, 'left', [[1]]), r'\[1\].*\[2\]'),
    ],
)
def test_pad_batch_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        prompts.pad_batch(*arguments)


def first_end(tokenizer, ids, stop='<|end|>'):
    """Plain reference: the shortest prefix whose text holds the stop string."""
    for n in range(1, len(ids) + 1):
        if stop in tokenizer.decode(ids[:n]):
            return n
    return len(ids)


def test_stop_is_found_where_it_merges_with_what_stands_before(tokenizer):
    captions = ['A red cup.', 'a 猫 – naïve café 🐈', 'cup', '']
    rows = [
        tokenizer(f'{c}<|end|>\nmore text <|end|>', add_special_tokens=False)['input_ids']
        for c in captions
    ]
    # The merge this is about does happen: no token of the row starts with the marker's '<'.
    assert '.<' in tokenizer.convert_ids_to_tokens(rows[0])
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (width - len(row))] for row in rows])
    texts, mask = prompts.truncate_at_stop(ids, tokenizer, ('<|end|>',))
    assert texts == captions
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [first_end(tokenizer, row) for row in rows]
    # Ones first, then zeros.
    assert (mask.long().diff(dim=1) <= 0).all()


def test_eos_counts_and_ends(tokenizer):
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    stop = tokenizer('<|end|>', add_special_tokens=False)['input_ids']
    a, b = tokenizer(' red cup', add_special_tokens=False)['input_ids']
    width = 3 + len(stop)
    rows = [
        [a, b, eos, *stop],
        [a, eos, *[pad] * (width - 2)],
        [a] * width,
        [eos] + [pad] * (width - 1),
    ]
    texts, mask = prompts.truncate_at_stop(torch.tensor(rows), tokenizer, ('<|end|>',))
    assert texts == [' red cup', ' red', ' red' * width, '']
    assert mask.sum(1).tolist() == [3, 2, width, 1]


def test_the_earlier_of_two_stop_strings_wins(tokenizer):
    ids = tokenizer('one. STOP two <|end|>', add_special_tokens=False)['input_ids']
    texts, mask = prompts.truncate_at_stop(torch.tensor([ids]), tokenizer, ('<|end|>', ' STOP'))
    assert texts == ['one.']
    assert mask.sum().item() == first_end(tokenizer, ids, ' STOP')


def test_stop_search_agrees_with_a_linear_search_on_random_tokens(tokenizer):
    rng = np.random.default_rng(0)
    stop = tokenizer('.<|end|>', add_special_tokens=False)['input_ids']
    rows = []
    for _ in range(12):
        row = rng.integers(0, 151000, 30).tolist()
        at = int(rng.integers(0, 30 - len(stop)))
        row[at : at + len(stop)] = stop
        rows.append(row)
    _, mask = prompts.truncate_at_stop(torch.tensor(rows), tokenizer, ('<|end|>',), [])
    assert mask.sum(1).tolist() == [first_end(tokenizer, row) for row in rows]


def test_a_character_of_several_tokens_before_the_stop():
    tokenizer = byte_tokenizer()
    ids = tokenizer('é猫<|end|>!', add_special_tokens=False)['input_ids']
    texts, mask = prompts.truncate_at_stop(torch.tensor([ids]), tokenizer, ('<|end|>',))
    # Two bytes, three bytes, seven bytes of the marker.
    assert texts == ['é猫']
    assert mask.sum().item() == 12
