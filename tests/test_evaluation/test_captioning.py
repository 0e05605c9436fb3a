"""Region captioning scores."""

from __future__ import annotations

import pytest
from nltk.translate.meteor_score import single_meteor_score

from projects.llava_sam2_rl.evaluation import RegionCaptionMetric, captioning
from projects.llava_sam2_rl.rewards.meteor import NoSynonyms
from projects.llava_sam2_rl.structures import RegionMeta


def evaluate(pairs):
    metric = RegionCaptionMetric(synonyms='off')
    metas = [RegionMeta('a', str(i), ref, None, 4, 4) for i, (_, ref) in enumerate(pairs)]
    predictions = [{'caption': caption, 'reference': ref} for caption, ref in pairs]
    metric.process({'data': {}, 'data_samples': metas}, predictions)
    return metric.evaluate(len(pairs)), metric


def test_meteor_is_nltks_and_needs_a_reference():
    found, metric = evaluate(
        [('a red cup', 'A red cup.'), ('the dog', 'one small cat'), ('a cup', None)]
    )
    by_hand = [
        single_meteor_score(['a', 'red', 'cup'], ['a', 'red', 'cup'], wordnet=NoSynonyms()),
        0.0,
    ]
    assert found['captioning/a/meteor'] == pytest.approx(sum(by_hand) / 2)
    assert by_hand[0] == pytest.approx(1 - 0.5 / 27)
    assert found['captioning/a/no_reference'] == 1
    assert found['captioning/a/num_samples'] == 3
    assert [row['meteor'] for row in metric.rows] == pytest.approx([*by_hand, None])


def test_without_pycocoevalcap_there_is_no_cider(monkeypatch):
    monkeypatch.setattr(captioning, '_cider', lambda: None)
    found, _ = evaluate([('a red cup', 'a red cup')])
    assert 'captioning/a/cider' not in found
    assert found['captioning/a/meteor'] > 0.9


def test_cider_is_ten_for_equal_texts_and_none_for_foreign_ones():
    """CIDEr-D by hand: a cosine of 1 for each n-gram length times 10; of 0 without common words."""
    pytest.importorskip('pycocoevalcap', reason='CIDEr needs pycocoevalcap')
    texts = ['one red cup on table', 'two small dogs in grass', 'three old men at sea']
    assert captioning.cider(texts, texts) == pytest.approx(10)
    other = ['alpha beta gamma delta', 'epsilon zeta eta theta', 'iota kappa lambda mu']
    assert captioning.cider(other, texts) == pytest.approx(0)
    found, _ = evaluate([(text.upper() + '.', text) for text in texts])
    assert found['captioning/a/cider'] == pytest.approx(10)
