import json

import pytest

from projects.llava_sam2_rl.rewards import dlc

COLOR = dlc.Question(
    'What color is it?',
    (('red', 1.0), ('dark red', 0.5), ('not mentioned', 0.0), ('blue', -1.0)),
    'positive',
)
WHEELS = dlc.Question('Wheels?', (('mentioned', -1.0), ('absent', 1.0)), 'negative')
OPTIONS = ['red', 'dark red', 'not mentioned', 'blue']


@pytest.mark.parametrize(
    ('answer', 'expected'),
    [
        # exact text, letter, or both
        ('dark red', 1),
        (' "Dark  red". ', 1),
        ('**blue**', 3),
        ('B', 1),
        ('d.', 3),
        ('(C)', 2),
        ('B. dark red', 1),
        ('a) red', 0),
        # exactly one choice contained, whole words only
        ('The color is blue, I think.', 3),
        ('It is not mentioned anywhere', 2),
        ('It is a bluered thing', None),
        ('It is red', 0),
        # a leading letter, where no single choice is contained
        ('B) because it is said so', 1),
        ('c: no word about it', 2),
        ('D\nThe text says so', 3),
        ('B is right', 1),
        ('A mixture of red and blue', 3),
        ('A: red or blue', 0),
        # the last, the longest
        ('not blue but dark red', 1),
        ('first red, then blue', 3),
        # nothing
        ('', None),
        ('green', None),
        ('E', None),
        ('A mystery', None),
    ],
)
def test_every_parse_path(answer, expected):
    assert dlc.parse_choice(answer, OPTIONS) == expected


def test_yes_and_no_do_not_hide_in_other_words():
    assert dlc.parse_choice('Yes, it is.', ['Yes', 'No']) == 0
    assert dlc.parse_choice('Nothing of the kind', ['Yes', 'No']) is None
    assert dlc.parse_choice('B', ['Yes', 'No']) == 1


@pytest.mark.parametrize(
    ('choice', 'recognised', 'expected'),
    [
        *[(0, True, 1), (1, True, 0.5), (2, True, 0), (3, True, -1), (None, True, 0)],
        *[(0, False, 0), (1, False, 0), (2, False, 0), (3, False, -1), (None, False, 0)],
    ],
)
def test_positive_scores(choice, recognised, expected):
    assert dlc.question_score(COLOR, choice, recognised) == expected


def test_negative_scores():
    assert dlc.question_score(WHEELS, 0, True) == -1
    assert dlc.question_score(WHEELS, 1, True) == 1
    assert dlc.question_score(WHEELS, 1, False) == 0


def test_region_and_benchmark_by_hand():
    first = dlc.region_score([COLOR, COLOR, WHEELS], [0, 1, 0], recognised=True)
    assert (first.positive, first.negative) == (0.75, -1)
    assert first.reward == 0  # (0.75 - 1) / 2 < 0
    second = dlc.region_score([COLOR, WHEELS], [1, 1], recognised=True)
    assert second.reward == 0.75
    third = dlc.region_score([COLOR, WHEELS], [0, 1], recognised=False)
    assert (third.positive, third.negative, third.reward) == (0, 0, 0)
    lone = dlc.region_score([COLOR], [1], recognised=True)
    assert (lone.positive, lone.negative, lone.reward) == (0.5, None, 0.5)
    scores = dlc.benchmark_score([first, second, third, lone])
    assert scores['pos'] == pytest.approx((0.75 + 0.5 + 0 + 0.5) / 4)
    assert scores['neg'] == pytest.approx((-1 + 1 + 0) / 3)
    assert scores['avg'] == pytest.approx(0.4375 / 2)
    with pytest.raises(ValueError, match='0 with negative'):
        dlc.benchmark_score([lone])
    with pytest.raises(ValueError, match='without questions'):
        _ = dlc.region_score([], [], True).reward


def test_the_order_of_choices_is_fixed_by_the_seed():
    orders = {seed: dlc.shuffled(COLOR, seed).options for seed in range(20)}
    assert all(sorted(order) == sorted(OPTIONS) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) > 3
    assert orders[3] == dlc.shuffled(COLOR, 3).options
    assert dict(dlc.shuffled(COLOR, 1).choices) == dict(COLOR.choices)


def test_question_file(tmp_path):
    item = {'question': 'Q', 'choices': [['a', 1], ['b', -1]], 'type': 'negative', 'extra': 1}
    path = tmp_path / 'qa.json'
    path.write_text(json.dumps({'17': [item]}))
    expected = dlc.Question('Q', (('a', 1.0), ('b', -1.0)), 'negative')
    assert dlc.load_question_file(path) == {'17': (expected,)}


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'type': 'other'}, "region 3, question 1: type 'other'"),
        ({'choices': [['a', 1]]}, '1 choices'),
        ({'choices': [['a', 1], ['A.', 0]]}, 'read the same'),
        ({'choices': [['a', 2], ['b', 0]]}, 'outside'),
        ({'choices': [['a', 'x'], ['b', 0]]}, 'expected'),
        ({'question': 5}, 'must be text'),
    ],
)
def test_bad_questions_are_named(change, words):
    item = {'question': 'Q', 'choices': [['a', 1], ['b', -1]], 'type': 'negative', **change}
    with pytest.raises(ValueError, match=words):
        dlc.parse_questions([item], 'region 3')
    with pytest.raises(ValueError, match='expected a list'):
        dlc.parse_questions(item, 'region 3')
