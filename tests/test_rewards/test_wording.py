"""The words of the judge: from which file, of which number, and what the scores compare with."""

from __future__ import annotations

import pytest

from projects.llava_sam2_rl.rewards import dlc
from projects.llava_sam2_rl.rewards.wording import DEFAULT_TEMPLATE, is_plural, load_wording
from projects.llava_sam2_rl.utils.pretrained import resolve

COLOR = dlc.Question(
    'What color is it?',
    (('red', 1.0), ('dark red', 0.5), ('not mentioned', 0.0), ('blue', -1.0)),
    'positive',
)
MINE = """
name = "mine"
prompt = "{caption}|{question}|{choices}"
choice = "{letter}) {text}"
recognition_singular = "Is it {class_name}?"
recognition_plural = "Are they {class_name}?"
"""


def test_the_default_holds_caption_question_and_lettered_choices():
    prompt = load_wording().question_prompt('A red {car}.', COLOR)
    for part in (
        'A red {car}.',
        'What color is it?',
        'A. red\nB. dark red\nC. not ',
        'exactly one',
    ):
        assert part in prompt


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('car', 'Is the described object likely a car, or an object of'),
        ('apple', 'likely an apple, or'),
        ('hour glass', 'likely an hour glass, or'),
        ('bus', 'Is the described object likely a bus, or'),
        ('scissors', 'Are the described objects likely scissors, or objects of'),
        ('traffic lights', 'likely traffic lights, or'),
    ],
)
def test_article_and_plural(name, text):
    question = load_wording().recognition_question(name)
    assert text in question.text
    assert question.options == ['Yes', 'No']


def test_what_is_a_plural():
    assert not is_plural('bus')
    assert not is_plural(' Bus')
    assert is_plural('buses')
    assert not is_plural('grass')


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / 'mine.toml'
    path.write_text(MINE)
    wording = load_wording(path)
    assert wording.question_prompt('c', COLOR).startswith('c|What color is it?|A) red\nB) dark')
    assert wording.recognition_question('owl').text == 'Is it an owl?'
    assert wording.digest != load_wording().digest
    path.write_text(MINE.replace('it {', 'that {'))
    assert load_wording(path).digest != wording.digest


def test_what_a_score_compares_with(tmp_path):
    judge = 'meta-llama/Llama-3.1-8B-Instruct'
    ours = load_wording()
    assert 'no published number' in ours.comparison(judge)
    assert 'is not Llama' not in ours.comparison(judge)
    path = tmp_path / 'official.toml'
    path.write_text('official = true\n' + MINE)
    official = load_wording(path)
    # DLC-Bench's table: pos, neg, avg.
    assert 'DAM-3B 0.510/0.830/0.670' in official.comparison(judge)
    assert "judge 'gpt-4o' is not Llama" in official.comparison('gpt-4o')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('name = "x"', "needed are .*'recognition_plural'"),
        (MINE + 'typo = "x"', "'typo'"),
        (MINE.replace('{choices}', ''), r"prompt has the fields \['caption', 'question'\]"),
        (MINE.replace('{text}', '{text} {'), 'choice: .*brace'),
        (MINE + 'official = "yes"', 'official is a str'),
        ('name = ', 'is no TOML'),
    ],
)
def test_files_that_will_not_do(tmp_path, text, message):
    path = tmp_path / 'mine.toml'
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_wording(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(resolve(DEFAULT_TEMPLATE))):
        load_wording(tmp_path / 'nothing.toml')
