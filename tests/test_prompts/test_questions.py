"""What is asked about an image and answered, before a template goes around it."""

from __future__ import annotations

import pytest

from projects.llava_sam2_rl import prompts


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
