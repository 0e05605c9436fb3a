"""Texts of data sets without what a tokenizer or a template would take for more than words."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from projects.llava_sam2_rl import prompts
from projects.llava_sam2_rl.utils.pretrained import resolve

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / 'shared'
TINY = resolve('llava_sam2_rl://assets/sa2va_tiny')
BIG = SHARED / 'fixtures/sa2va_4b_tokenizer'


def big():
    if not BIG.is_dir():
        pytest.skip(f'the tokenizer of Sa2VA-4B is not here ({BIG})')
    return BIG


@pytest.mark.parametrize(
    ('text', 'plain', 'kinds'),
    [
        ('a dog <IMG_CONTEXT> on grass', 'a dog on grass', ['image_token']),
        ('<img>a dog</img>', 'a dog', ['image_token'] * 2),
        ('Sure, [SEG].', 'Sure, .', ['mask_token']),
        ('<p>a dog</p> <vp>', 'a dog', ['region_token'] * 3),
        ('a <ref>dog</ref><box>', 'a dog', ['region_token'] * 3),
        ('a dog.<|im_end|>\n<|im_start|>user', 'a dog. \n user', ['chat_marker'] * 2),
        ('<|end|>a dog<|user|> <|vision_start|>', 'a dog', ['chat_marker'] * 3),
        ('<s>a dog</s> <unk> [UNUSED_TOKEN_145]', 'a dog', ['chat_marker'] * 4),
        ('<tool_call>a</tool_call> <think>dog', 'a dog', ['chat_marker'] * 3),
        ('<image>\na <Video> of <Prompt12>', 'a of', ['placeholder'] * 3),
        ('a\x00dog \ud800 here\ufeff', 'a dog here', ['control_character'] * 3),
        # Nothing new forms where something is taken out.
        ('<<img>p> <|im_<img>end|> [[SEG]SEG]', '< p> <|im_ end|> [ SEG]', None),
        ('[SEG][SEG]<IMG_CONTEXT>', '', ['mask_token', 'mask_token', 'image_token']),
    ],
)
def test_markup_becomes_a_blank_and_is_counted(text, plain, kinds):
    made, counted = prompts.neutralize(text)
    assert ' '.join(made.split()) == ' '.join(plain.split())
    if kinds is not None:
        assert counted == Counter(kinds)
    assert prompts.neutralize(made) == (made, Counter())


@pytest.mark.parametrize(
    'text',
    [
        'a dog',
        '  two  blanks\nand lines ',
        'a <b>wooden</b> table, 3 < 4 > 2',
        'if a | b: [seg] <IMG_context> <prompt>',
        '雪の中の犬 😀 e\u0301',
        '',
    ],
)
def test_words_stay_as_they_are(text):
    assert prompts.neutralize(text) == (text, Counter())


def test_every_token_that_a_tokenizer_has_added_is_known():
    """Of Sa2VA-4B's and the tiny model's; bos, eos and reserve of InternLM2 by their names."""
    added = [token for folder in (TINY, big()) for token in _added(folder)]
    assert len(added) > 30
    for token in [*added, '<s>', '</s>', '<unk>', '[UNUSED_TOKEN_0]', '<|action_start|>']:
        made, kinds = prompts.neutralize(f'a{token}b')
        assert made == 'a b', token
        assert sum(kinds.values()) == 1


def _added(folder):
    return json.loads((Path(folder) / 'added_tokens.json').read_text())


def test_no_template_text_survives():
    for template in prompts.TEMPLATES.values():
        text = template.ask('a dog') + template.answer('a cat')
        made, _ = prompts.neutralize(text)
        assert not any(stop in made for stop in template.stop_strings)
        assert '<|' not in made


def test_no_mixture_of_pieces_becomes_a_special_token():
    """Against the real tokenizers: ids of added tokens never come out of a plain text."""
    draw = random.Random(0)
    pieces = [
        '<',
        '>',
        '|',
        '[',
        ']',
        'SEG',
        'img',
        '/',
        'IMG_CONTEXT',
        'im_end',
        ' ',
        'vp',
        '\x00',
    ]
    pieces += ['p', '<IMG_CONTEXT>', '[SEG]', '<|im_end|>', '<|', '|>', '\u0338', 'K', 'a dog']
    for folder in (TINY, big()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = set(tokenizer.get_added_vocab().values())
        assert special & set(prompts.encode_text(tokenizer, 'a [SEG]'))
        for _ in range(2000):
            text = ''.join(draw.choices(pieces, k=draw.randint(1, 12)))
            ids = prompts.encode_text(tokenizer, f'Please segment {prompts.neutralize(text)[0]} in')
            assert not special & set(ids), text


@pytest.mark.parametrize(
    ('name', 'plain'),
    [
        ('photos/dog 1.jpg', 'photos/dog 1.jpg'),
        ('<IMG_CONTEXT>[SEG].jpg', '(IMG_CONTEXT)(SEG).jpg'),
        ('a<|im_end|>', 'a(|im_end|)'),
        ('a\nb\x07', 'a\\nb\\x07'),
        (b'caf\xe9.jpg'.decode('utf-8', 'surrogateescape'), 'caf\\udce9.jpg'),
    ],
)
def test_names_stay_recognisable(name, plain):
    made, kinds = prompts.neutralize_name(name)
    assert made == plain
    made.encode()
    assert bool(kinds) == any(c in name for c in '<[\x07\udce9')


def test_a_long_name_loses_its_middle():
    made, _ = prompts.neutralize_name('a' * 5000 + '.jpg')
    assert len(made) == 201
    assert made.startswith('aaa')
    assert made.endswith('.jpg')


def test_the_estimate_is_near_what_the_real_tokenizer_gives(root):
    tokenizer = AutoTokenizer.from_pretrained(big())
    photographs = root / 'projects/llava_sam2_rl/assets/photographs/annotations.json'
    annotations = json.loads(photographs.read_text())['annotations']
    texts = [' '.join(s for a in annotations for s in a['sentences'])]
    texts += ['一个穿红色夹克的男人骑着自行车在湿漉漉的街道上，回头看。']
    texts += ['Мужчина в красной куртке едет на велосипеде по мокрой улице']
    texts += ['The number plate reads 1234567890, 98765 and 555-1234.', '!@#$%^&*()' * 10]
    for text in texts:
        tokens = len(prompts.encode_text(tokenizer, text))
        assert 0.85 * tokens < prompts.estimate_tokens(text) < 1.5 * tokens, text[:30]


def test_tokens_by_hand():
    # 'dog' 1, 'elephant' 8 letters 2, '.' 1; digits one by one; three bytes a character.
    assert prompts.estimate_tokens('dog elephant.') == 4
    assert prompts.estimate_tokens('12 dogs!') == 4
    assert prompts.estimate_tokens('犬犬犬犬') == 3
    assert prompts.estimate_tokens(' \n ') == 0
    assert prompts.estimate_tokens('x' * 4000) == 1000


@pytest.mark.parametrize(
    ('text', 'limit', 'cut'),
    [
        ('A dog. A cat.', 6, 'A dog. A cat.'),
        ('A dog. A cat.', 5, 'A dog.'),
        ('A dog. A cat.', 3, 'A dog.'),
        ('A dog. A cat.', 2, None),
        ('A dog!" he said "it" runs', 4, 'A dog!"'),
        ('犬。猫。鳥。', 4, '犬。猫。'),
        ('no end ' * 50, 20, None),
        ('line one\nline two', 2, 'line one'),
        ('Version 2.5 of it runs on. And on.', 11, 'Version 2.5 of it runs on.'),
    ],
)
def test_a_long_text_ends_with_a_sentence(text, limit, cut):
    assert prompts.cut_at_sentence(text, limit) == cut
