from collections import Counter

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import BadRecord
from projects.llava_sam2_rl.datasets.captions import (
    RegionText,
    category_name,
    draw_text,
    region_texts,
)


def chat(*turns):
    names = ('human', 'gpt')
    return {'conversations': [{'from': names[i % 2], 'value': t} for i, t in enumerate(turns)]}


@pytest.mark.parametrize(
    ('record', 'expected'),
    [
        ({'caption': ' a  red\ncup. '}, 'a red cup.'),
        (chat('<image>\nDescribe it.', 'a red cup'), 'a red cup'),
        (chat('Describe it.', 'a red cup', 'And now?', 'still a cup'), 'a red cup'),
        ({'caption': 'this', **chat('q', 'not this')}, 'this'),
        ({'caption': None, **chat('q', 'this')}, 'this'),
        (chat('q', '<image>\na cup in <IMAGE> it'), 'a cup in it'),
        ({'conversations': [{'from': 'system', 'value': 's'}, {'from': 'gpt', 'value': 'x'}]}, 'x'),
        ({'conversations': [{'from': 'gpt', 'value': None}]}, ''),
        # Markup is taken out where all sources are read, and counted there.
        ({'caption': 'a cup<|end|> and [SEG] more'}, 'a cup<|end|> and [SEG] more'),
        ({}, None),
        ({'caption': None, 'conversations': None}, None),
        ({'conversations': []}, None),
        (chat('only a question'), None),
    ],
)
def test_the_caption_of_one_region(record, expected):
    assert region_texts(record, 1, 'x/1') == [RegionText((0,), expected)]


@pytest.mark.parametrize(
    ('answer', 'regions', 'expected'),
    [
        ('<Prompt0> holds <Prompt1>.', (0, 1), 'region1 holds region2.'),
        # The model is given masks 1 and 3 only and told of region1 and region2.
        (
            '<Prompt3> is behind <Prompt1>, <Prompt3>!',
            (1, 3),
            'region2 is behind region1, region2!',
        ),
        ('<Prompt2>: a cup', (2,), 'a cup'),
        ('<Prompt2> is a cup', (2,), 'region1 is a cup'),
        ('<Prompt0>: a cup; <Prompt1>: a mat', (0, 1), 'region1: a cup; region2: a mat'),
    ],
)
def test_prompt_placeholders_name_masks(answer, regions, expected):
    record = chat('What of <Prompt0> and <Prompt3>?', answer)
    assert region_texts(record, 4, 'x/1') == [RegionText(regions, expected)]


def test_the_question_names_the_masks_where_the_answer_does_not():
    record = chat('<image> What of <Prompt2> and <Prompt0>?', 'One is on the other.')
    assert region_texts(record, 4, 'x/1') == [RegionText((0, 2), 'One is on the other.')]


def test_without_placeholders_each_mask_has_its_answer():
    record = chat('q', 'a cat', 'q', 'a mat', 'q', 'both')
    assert region_texts(record, 2, 'x/1') == [
        RegionText((0,), 'a cat'),
        RegionText((1,), 'a mat'),
    ]
    # Fewer answers than masks: the first speaks of all.
    assert region_texts(record, 4, 'x/1') == [RegionText((0, 1, 2, 3), 'a cat')]


def test_a_text_and_another_as_distractor_are_drawn():
    texts = [RegionText((i,), caption) for i, caption in enumerate(['a', 'b', '', 'c'])]
    rng = np.random.default_rng(0)
    drawn = [draw_text(texts, rng) for _ in range(400)]
    counts = Counter(text.caption for text, _ in drawn)
    assert min(counts[c] for c in ('a', 'b', '', 'c')) > 60  # 100 expected
    assert all(other in {'a', 'b', 'c'} - {text.caption} for text, other in drawn)
    assert draw_text(texts[:1], rng) == (texts[0], None)


@pytest.mark.parametrize('text', ['<Prompt4> is red', '<Prompt99999999999999999999>', '<prompt07>'])
def test_a_mask_that_is_not_there_is_a_bad_record(text):
    with pytest.raises(BadRecord, match='bad_prompt_index'):
        region_texts(chat('q', text), 4, 'x/1')


@pytest.mark.parametrize(
    'record',
    [
        {'caption': 7},
        {'caption': ['a']},
        {'conversations': 'a'},
        {'conversations': {'from': 'gpt'}},
        {'conversations': ['a']},
        {'conversations': [None]},
        {'conversations': [{'from': 'gpt', 'value': 3}]},
    ],
)
def test_fields_of_another_kind_are_bad_records(record):
    with pytest.raises(BadRecord, match='bad_caption') as caught:
        region_texts(record, 1, 'x/1')
    assert caught.value.name == 'x/1'


@pytest.mark.parametrize(
    ('value', 'expected'),
    [('cat', 'cat'), (['', 'cat', 'dog'], 'cat'), ([], None), (None, None), (' ', None), (3, None)],
)
def test_category(value, expected):
    assert category_name(value) == expected
