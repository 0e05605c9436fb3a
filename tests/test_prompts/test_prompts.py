"""Chat templates, questions and special tokens, against what the official functions gave."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from projects.llava_sam2_rl import prompts

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / 'shared'
OFFICIAL = json.loads((ROOT / 'tests/data/prompts/prompts.json').read_text())
CASES = [
    (template, name)
    for template, cases in OFFICIAL['cases'].items()
    for name in cases
    if not name.startswith('train_qwen_vl/')
]


def cases(kind: str) -> list:
    return [pytest.param(*case, id='-'.join(case)) for case in CASES if case[1].startswith(kind)]


@pytest.fixture(scope='module')
def tokenizer():
    folder = SHARED / 'fixtures' / 'sa2va_4b_tokenizer'
    if not folder.is_dir():
        pytest.skip(f'the Sa2VA-4B tokenizer is not at {folder}')
    return AutoTokenizer.from_pretrained(folder)


IMAGE = prompts.image_text(4)
CUP, TABLE = (
    prompts.SEGMENTATION_QUESTION.format(description=x) for x in ('the red cup', 'the table')
)
IT_IS, SURE = prompts.SEGMENTATION_ANSWERS[0], prompts.SEGMENTATION_ANSWERS[3]
CAPTIONS = ['A red ceramic cup with a chipped handle.', 'A <b>wooden</b> table, seen from above.']
#: What the samples of the official data sets say, before any template.
TURNS = {
    'region_1': prompts.region_turns(4, [3], [prompts.REGION_QUESTION], CAPTIONS[:1]),
    'region_2': prompts.region_turns(
        4,
        [3, 2],
        [
            prompts.REGION_QUESTION,
            'What details can you give me about the region outlined by region{i} in the photo?',
        ],
        CAPTIONS,
    ),
    'segmentation_1': [(IMAGE + CUP, IT_IS)],
    'segmentation_2': [(IMAGE + CUP, IT_IS), (TABLE, SURE)],
    'dialogue_3': [
        (IMAGE + 'What is on the table?', 'A cup.'),
        ('Is it full?', "I can't see inside."),
        ('Please segment it in this image.', 'Sure, [SEG].'),
    ],
    'text_only': [('Name a colour.', 'Red.')],
    'video_5_frames': [(5 * prompts.image_text(2) + CUP, IT_IS), (TABLE, SURE)],
    'gcg': [
        (
            IMAGE + 'Could you please give me a detailed description of the image? Please respond '
            'with interleaved segmentation masks for the corresponding parts of the answer.',
            '<p> A red cup </p> [SEG] stands on <p> a table </p> [SEG].',
        )
    ],
}
TILES = 9 * 4
#: What the user says in the official inference.
ASKED = {
    'segmentation': prompts.segmentation_input(4, 'the red cup', prompts.REFCOCO_QUESTION),
    # Asked there without a newline behind the image.
    'segmentation_tiles': prompts.image_text(TILES).strip() + CUP,
    'region_1': prompts.region_input(4, [2]),
    # Two newlines: the question there begins with one.
    'region_1_newline': prompts.region_input(
        4,
        [2],
        '\nPlease give me a short description of the region in the picture marked by region{i}.',
    ),
    # One question about the second of two regions.
    'region_2_tiles': f'{prompts.image_text(TILES)}{prompts.region_list([2, 4])}\n'
    + prompts.REGION_QUESTION.replace('{i}', '2'),
    'video_8_frames': 5 * IMAGE + 'Please segment the red cup.',
    'video_3_frames': 3 * IMAGE + ' What moves? Please respond with a segmentation mask.',
    'text_only': 'Name a colour.',
}


@pytest.mark.parametrize('name', OFFICIAL['templates'])
def test_templates_are_the_official_ones_and_xtuners(name):
    template, official = prompts.find_template(name), OFFICIAL['templates'][name]
    assert template.name == name
    ours = (
        template.instruction,
        template.suffix,
        template.separator,
        list(template.stop_strings),
    )
    keys = ('INSTRUCTION', 'SUFFIX', 'SEP', 'STOP_WORDS')
    assert ours == tuple(official[key] for key in keys)
    from xtuner.utils import IGNORE_INDEX, PROMPT_TEMPLATE

    assert ours == tuple(PROMPT_TEMPLATE[name][key] for key in keys)
    assert prompts.IGNORE_INDEX == IGNORE_INDEX


def test_there_are_three_templates_found_by_name():
    assert list(prompts.TEMPLATES) == ['phi3_chat', 'qwen_chat', 'internlm2_chat']
    assert prompts.find_template('internlm2-chat').name == 'internlm2_chat'
    template = prompts.find_template('qwen-chat')
    assert prompts.find_template(template) is template
    with pytest.raises(dataclasses.FrozenInstanceError):
        template.suffix = ''
    for name in ('phi3', 'vicuna', '', None):
        with pytest.raises(ValueError, match=r'phi3_chat, qwen_chat, internlm2_chat') as error:
            prompts.find_template(name)
        assert repr(name) in str(error.value)


def test_importing_the_data_sets_does_not_import_xtuner():
    code = 'import sys, projects.llava_sam2_rl.datasets; sys.exit("xtuner" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)


# -- texts, as the official functions write them ---------------------------------------------------


def pieces(template: prompts.ChatTemplate, turns: list) -> list:
    return [
        piece
        for question, answer in turns
        for piece in (
            [template.ask(question), False],
            [template.answer(answer), True],
            [template.separator, False],
        )
    ]


@pytest.mark.parametrize(('template', 'name'), cases('train/'))
def test_training_texts_and_supervised_spans(template, name):
    case, ours = OFFICIAL['cases'][template][name], prompts.find_template(template)
    found = pieces(ours, TURNS[name.split('/')[1]])
    assert found == case['pieces']
    assert ''.join(text for text, _ in found) == case['text']
    spans, at = [], 0
    for text, supervised in found:
        spans += [[at, at + len(text)]] if supervised else []
        at += len(text)
    assert spans == case['supervised_spans']


@pytest.mark.parametrize(('template', 'name'), cases('train_v1/'))
def test_texts_of_the_first_code_base(template, name):
    case = OFFICIAL['cases'][template][name]
    v1 = prompts.find_template(template).referring('v1')
    found = pieces(v1, TURNS[name.split('/')[1]])
    assert ''.join(text for text, _ in found) == case['text']
    assert ''.join(text for text, said in found if said) == case['supervised_text']
    assert prompts.find_template(template).referring('template').name == template
    with pytest.raises(ValueError, match="'v3', expected one of 'template', 'v1'"):
        v1.referring('v3')


@pytest.mark.parametrize(('template', 'name'), cases('infer/'))
def test_inference_texts_and_stop_words(template, name):
    case, ours = OFFICIAL['cases'][template][name], prompts.find_template(template)
    assert ours.ask(ASKED[name.split('/')[1]]) == case['text']
    assert list(ours.stop_strings) == case['stop_words']


# -- token ids, with the real tokenizer ------------------------------------------------------------


@pytest.mark.parametrize(('template', 'name'), [*cases('train/'), *cases('train_v1/')])
def test_training_ids_and_labels(template, name, tokenizer):
    case = OFFICIAL['cases'][template][name]
    kind, sample = name.split('/')
    asked = template
    if kind == 'train_v1':
        asked = prompts.find_template(template).referring('v1')
    ids, labels = prompts.encode_turns(tokenizer, asked, TURNS[sample])
    assert ids == case['input_ids']
    assert labels == case['labels']


@pytest.mark.parametrize(('template', 'name'), cases('infer/'))
def test_inference_ids_and_end(template, name, tokenizer):
    case = OFFICIAL['cases'][template][name]
    assert prompts.encode_prompt(tokenizer, case['text']) == case['input_ids']
    assert prompts.decode_text(tokenizer, case['input_ids']) == case['text']
    assert tokenizer.eos_token_id == case['eos_token_id']


def test_pieces_do_not_merge():
    """The case the pieces are for; elsewhere encoding the joined text gives the same."""
    different = [
        name
        for name, case in OFFICIAL['cases']['phi3_chat'].items()
        if case.get('joined_ids', case['input_ids']) != case['input_ids']
    ]
    assert 'train/segmentation_2' in different
    assert not any('joined_ids' in case for case in OFFICIAL['cases']['qwen_chat'].values())


class Bytes:
    """A tokenizer of single characters."""

    def __init__(self, bos_token_id):
        self.bos_token_id = bos_token_id

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [ord(c) for c in text]


class Qwen2Tokenizer(Bytes):
    """Named as transformers' slow class, which the official code fails on."""


@pytest.mark.parametrize(
    ('tokenizer', 'bos'), [(Bytes(1), [1]), (Bytes(None), []), (Qwen2Tokenizer(1), [])]
)
def test_bos_stands_once_at_the_start(tokenizer, bos):
    ids, labels = prompts.encode_turns(tokenizer, 'internlm2_chat', [('a', 'b'), ('c', 'd')])
    text = '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n'
    first, second = text.format('a'), text.format('c')
    assert ids == bos + [ord(c) for c in f'{first}b<|im_end|>\n{second}d<|im_end|>\n']
    said = ''.join(chr(i) for i in labels if i != -100)
    assert said == 'b<|im_end|>d<|im_end|>'
    assert labels[: len(bos)] == [-100] * len(bos)
    assert prompts.encode_prompt(tokenizer, 'a') == [*bos, ord('a')]


def test_a_conversation_without_turns_is_refused():
    with pytest.raises(ValueError, match='at least one question'):
        prompts.encode_turns(Bytes(None), 'qwen_chat', [])


# -- questions -------------------------------------------------------------------------------------


def test_the_list_of_regions():
    assert prompts.region_list([2]) == (
        'There are 1 part regions in the picture: region1<vp><IMG_CONTEXT><IMG_CONTEXT></vp>.'
    )
    assert prompts.region_list([1, 2]) == (
        'There are 2 part regions in the picture: region1<vp><IMG_CONTEXT></vp>, '
        'region2<vp><IMG_CONTEXT><IMG_CONTEXT></vp>.'
    )


def test_one_description_of_several_regions_names_them_all():
    asked = prompts.region_input(1, [1, 1, 1], 'What {is} region{i}?')
    assert asked.endswith('.\nWhat {is} region1, region2 and region3?')
    assert prompts.region_input(1, [1, 1]).endswith(
        'the region region1 and region2 in the image in detail.'
    )


def test_segmentation_questions():
    assert prompts.segmentation_input(2, 'a red {cup}') == (
        '<img><IMG_CONTEXT><IMG_CONTEXT></img>\nPlease segment a red {cup} in this image.'
    )
    asked = prompts.segmentation_input(1, 'the cat', 'Where is {description}?')
    assert asked == '<img><IMG_CONTEXT></img>\nWhere is the cat?'
    assert 'segment  in this' in prompts.segmentation_input(1, '')


def test_answers_are_the_contracts():
    assert prompts.SEGMENTATION_ANSWERS == (
        'It is [SEG].',
        'Sure, [SEG].',
        'Sure, it is [SEG].',
        'Sure, the segmentation result is [SEG].',
        '[SEG].',
    )
    for questions, place in (
        (prompts.SEGMENTATION_QUESTIONS, '{description}'),
        (prompts.REGION_QUESTIONS, 'region{i}'),
    ):
        assert all(place in question and '[SEG]' not in question for question in questions)
        assert len(set(questions)) == len(questions)


def test_drawn_questions_depend_on_sample_and_iteration_alone():
    questions = prompts.REGION_QUESTIONS
    drawn = [prompts.draw_question(questions, f'set/{i}', 7) for i in range(400)]
    assert drawn == [prompts.draw_question(questions, f'set/{i}', 7) for i in range(400)]
    counts = [drawn.count(question) for question in questions]
    # 50 each on average; the standard deviation is 6.6.
    assert min(counts) > 20
    assert len({prompts.draw_question(questions, 'set/1', i) for i in range(60)}) == len(questions)


def test_texts_to_be_asked_have_a_place_for_what_they_ask_about():
    with pytest.raises(ValueError, match=r"names no region: write 'region\{i\}'"):
        prompts.Questions(region='Please describe the region.')
    for key in ('segmentation', 'referring'):
        with pytest.raises(ValueError, match=r'has no \{description\}'):
            prompts.Questions(**{key: 'Please segment.'})


def test_turns_need_a_question_and_a_caption_a_region():
    with pytest.raises(ValueError, match='2 regions, 1 questions and 2 captions'):
        prompts.region_turns(4, [1, 1], [prompts.REGION_QUESTION], ['a', 'b'])


@pytest.mark.parametrize('counts', [[], [3, 0]])
def test_a_region_without_a_cell_is_refused(counts):
    with pytest.raises(ValueError, match='at least one cell'):
        prompts.region_list(counts)


def test_a_description_with_a_special_token_is_refused():
    with pytest.raises(ValueError, match=r'\[SEG\]'):
        prompts.segmentation_input(4, 'the [SEG] cat')
    with pytest.raises(ValueError, match='description'):
        prompts.segmentation_input(4, 'the cat', 'Where is it?')


@pytest.mark.parametrize(
    ('text', 'clean'),
    [
        ('  a red\n\tcup . ', 'a red cup .'),
        ('a cup.<|end|>\n<|user|>more', 'a cup.'),
        ('a <vp>cup</vp> [SEG] here<|im_end|>, or there', 'a cup here'),
        ('a cup<|endoftext|>', 'a cup'),
        ('a <|im_start|> cup', 'a cup'),
        ('<|assistant|>\nA cup', 'A cup'),
        ('<|end|>', ''),
        ('2 < 3 | 4 > 1', '2 < 3 | 4 > 1'),
    ],
)
def test_clean_caption(text, clean):
    assert prompts.clean_caption(text) == clean


@pytest.mark.parametrize(
    ('caption', 'description'),
    [('The Cat.', 'The Cat'), ('a cat', 'a cat'), ('', ''), ('no. 3 . ', 'no. 3')],
)
def test_as_description(caption, description):
    assert prompts.strip_final_period(caption) == description


# -- tokenizers, padding and stops -----------------------------------------------------------------


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
