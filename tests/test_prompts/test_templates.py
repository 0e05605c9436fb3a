"""Chat templates and conversations, against what the official functions gave."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    'video_8_frames': prompts.clip_input(5, 4, 'the red cup'),
    'video_3_frames': prompts.clip_input(3, 4, 'What moves?'),
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
