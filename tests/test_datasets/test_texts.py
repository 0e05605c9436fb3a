"""The texts of records, whatever source or class they come from."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import BadRecord, RegionDataset, Sa2VATransform, sa2va_collate
from projects.llava_sam2_rl.datasets.texts import UnusableText, plain_sample
from projects.llava_sam2_rl.hooks import BadRecordHook
from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.prompts import MARKUP, SPECIAL_TOKENS
from projects.llava_sam2_rl.structures import RegionSample

#: A word of four letters is a token of the estimate, with its full stop two.
LONG = 'word word word word. ' * 500

MARKERS = [*SPECIAL_TOKENS, '<image>', '<|im_end|>', '<|end|>', '<|im_start|>', '</s>', '<Prompt0>']


class Users(RegionDataset):
    """What a user writes: one record for each given set of fields."""

    def __init__(self, *records, **kwargs):
        super().__init__(source='users', **kwargs)
        self.records = records

    @property
    def num_records(self):
        return len(self.records)

    def read(self, index, rng):
        given = dict(self.records[index])
        regions = given.pop('regions', None)
        mask = np.ones((24, 32) if regions is None else (regions, 24, 32), bool)
        known = {'source': self.source, 'sample_id': str(index), **given}
        return RegionSample(np.full((24, 32, 3), 90, np.uint8), mask, **known)


def loaded(**fields):
    options = {key: fields.pop(key) for key in ('max_caption_tokens',) if key in fields}
    sample, changed = Users(fields, **options).load(0, np.random.default_rng(0))
    return sample, [kind for _, _, kind in changed]


def test_every_text_of_a_record_is_words_alone():
    sample, kinds = loaded(
        caption='a dog [SEG] <IMG_CONTEXT>',
        category='<p>dog',
        distractor='a cat<|im_end|>',
        sample_id='<image>.jpg',
    )
    assert sample.caption == 'a dog'
    assert (sample.category, sample.distractor) == ('dog', 'a cat')
    assert sample.sample_id == '(image).jpg'
    assert Counter(kinds) == Counter(
        ['mask_token', 'image_token', 'region_token', 'chat_marker', 'placeholder']
    )
    sample, kinds = loaded(regions=2, region_captions=('<vp>a', 'b [SEG]'))
    assert sample.region_captions == ('a', 'b')
    assert kinds == ['region_token', 'mask_token']
    turns = (('What <image>?', 'A dog.<|im_end|>'), ('And <img>?', 'No.'))
    sample, kinds = loaded(regions=0, conversation=turns)
    assert sample.conversation == (('What ?', 'A dog.'), ('And ?', 'No.'))
    assert sorted(kinds) == ['chat_marker', 'image_token', 'placeholder']


def test_plain_records_are_left_alone():
    texts = {'caption': ' A  dog,\n<b>big</b>. ', 'category': 'dog', 'distractor': 'a cat'}
    sample, kinds = loaded(**texts)
    assert kinds == []
    assert {key: getattr(sample, key) for key in texts} == texts


def test_a_caption_of_markup_is_none():
    sample, _ = loaded(caption='[SEG]<IMG_CONTEXT>')
    assert sample.caption is None
    with pytest.raises(BadRecord, match='users/0: empty_caption'):
        Users({'caption': '[SEG]'}, needs_caption=True).load(0, None)
    # Without a region, the caption is all there is.
    with pytest.raises(BadRecord, match=r"users/0: empty_caption: nothing but markup: '\[SEG\]'"):
        loaded(regions=0, caption='[SEG]')
    with pytest.raises(BadRecord, match='users/0: empty_turn'):
        loaded(regions=0, conversation=(('What?', '<|im_end|>'),))


def test_long_texts_end_with_a_sentence():
    sample, kinds = loaded(caption=LONG)
    assert sample.caption == ('word word word word. ' * 102).strip()  # 5 tokens each, 512 allowed
    assert kinds == ['cut_text']
    sample, _ = loaded(caption=LONG, max_caption_tokens=11)
    assert sample.caption == 'word word word word. word word word word.'
    sample, kinds = loaded(caption=LONG, max_caption_tokens=None)
    assert (sample.caption, kinds) == (LONG, [])
    sample, kinds = loaded(regions=2, region_captions=('a', LONG))
    assert len(sample.region_captions[1]) < len(LONG)
    assert kinds == ['cut_text']


def test_what_has_no_sentence_to_end_with_is_a_bad_record():
    with pytest.raises(BadRecord, match=r'users/0: long_caption: .*2000 .*max_caption_tokens=512'):
        loaded(caption='word ' * 2000)
    # Only a reference that nothing is learnt from.
    sample, _ = loaded(caption='a dog', distractor='word ' * 2000, category='word ' * 2000)
    assert (sample.distractor, sample.category) == (None, None)


def test_a_long_conversation_loses_its_last_turns():
    turns = (('Why?', 'word ' * 30 + '.'),) * 50  # 33 tokens a turn
    sample, kinds = loaded(regions=0, conversation=turns, max_caption_tokens=50)
    assert sample.conversation == turns[:6]
    assert kinds == ['cut_conversation']


def test_withheld_captions_spoil_no_record():
    data = Users({'caption': 'word ' * 2000}, withhold_captions=True)
    assert data[0]['sample'].caption is None


def test_another_encoding_is_a_bad_record_with_the_file_it_came_from(tmp_path):
    """Of classes that read a text without asking this package."""

    class Files(Users):
        def read(self, index, rng):
            (tmp_path / 'a.txt').write_text(self.records[index]['caption'], encoding='latin-1')
            (tmp_path / 'a.txt').read_text(encoding='utf-8')
            return super().read(index, rng)

        def sample_id(self, index):
            return f'a{index}.txt'

    data = Files({'caption': 'caf\xe9'}, {'caption': 'cafe'})
    assert data[0]['skipped'] == [('users', 'a0.txt', 'bad_encoding')]


def test_changes_reach_the_batch_and_are_counted_in_the_run(caplog):
    transform = Sa2VATransform(image_size=28, grounding_size=32)
    records = [{'caption': 'a dog [SEG] [SEG]'}, {'caption': LONG}, {'caption': 'a cat'}]
    batch = sa2va_collate(list(Users(*records, transforms=transform)))
    assert batch['data']['changed'] == [
        ('users', '0', 'mask_token'),
        ('users', '0', 'mask_token'),
        ('users', '1', 'cut_text'),
    ]
    hook = BadRecordHook()
    hook.after_train_iter(None, 0, batch)
    assert hook.changed == {('users', 'mask_token'): 2, ('users', 'cut_text'): 1}
    assert hook.read['users'] == 3


def record(caption):
    return RegionSample(np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), bool), caption)


def test_every_marker_is_taken_out():
    for marker in MARKERS:
        sample, kinds = plain_sample(record(f'a {marker} dog'), 512)
        assert sample.caption == 'a dog'
        assert set(kinds) < set(MARKUP)


def test_the_error_says_what_is_too_long():
    with pytest.raises(UnusableText, match='about 2250 tokens'):
        plain_sample(record('x' * 9000), 512)


def test_records_that_killed_a_run_are_trained_on(tiny_model, tiny_transform):
    """Special tokens in captions were embedded as image positions; 2 000 words took a minute."""
    captions = [f'a {marker} dog' for marker in MARKERS] + ['word ' * 9 + '. ' + LONG * 2]
    data = Users(*({'caption': caption} for caption in captions), transforms=tiny_transform)
    assert isinstance(tiny_model.policy, VideoLLaVASAMModel)
    for start in range(0, len(captions), 5):
        items = [data[i] for i in range(start, min(start + 5, len(captions)))]
        batch = sa2va_collate(items)
        losses = tiny_model(**batch, mode='loss')
        assert all(bool(loss.isfinite().all()) for loss in losses.values())
