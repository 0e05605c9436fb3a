import importlib
import logging

import pytest
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from nltk.translate.meteor_score import meteor_score

from projects.llava_sam2_rl.rewards.meteor import NoSynonyms, load_wordnet, meteor, tokenize

# `rewards.meteor` is the function of that name.
module = importlib.import_module('projects.llava_sam2_rl.rewards.meteor')
OFF = NoSynonyms()


@pytest.fixture(autouse=True)
def _forget_what_was_loaded():
    load_wordnet.cache_clear()
    yield
    load_wordnet.cache_clear()


class OneSynonymSet:
    """A WordNet that knows that a sofa is a couch."""

    def ensure_loaded(self):
        pass

    def synsets(self, word):
        return [self] if word in ('sofa', 'couch', 'dog') else []

    def lemmas(self):
        return [Lemma('sofa'), Lemma('couch'), Lemma('living_room_seat')]


class Lemma:
    def __init__(self, name):
        self._name = name

    def name(self):
        return self._name


def score(matches, chunks, hypothesis_length, reference_length):
    """The METEOR formula on counts: alpha 0.9, beta 3, gamma 0.5."""
    precision, recall = matches / hypothesis_length, matches / reference_length
    f_mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return f_mean * (1 - 0.5 * (chunks / matches) ** 3)


@pytest.mark.parametrize(
    ('reference', 'hypothesis', 'counts'),
    [
        ('the cat', 'a cat', (1, 1, 2, 2)),  # known: 0.25
        ('a red cup on the table', 'a red cup on the table', (6, 1, 6, 6)),
        ('a red cup on the table', 'the table', (2, 1, 2, 6)),
        ('on the table a cup', 'a cup on the table', (5, 2, 5, 5)),
        ('dogs running', 'a dog runs', (2, 1, 3, 2)),  # by stem
    ],
)
def test_by_hand(reference, hypothesis, counts):
    assert meteor(reference, hypothesis, wordnet=OFF) == pytest.approx(score(*counts))


def test_the_known_value():
    assert meteor('the cat', 'a cat', wordnet=OFF) == 0.25


def test_synonyms_match_where_wordnet_has_them():
    assert meteor('a couch', 'a sofa', wordnet=OneSynonymSet()) == pytest.approx(score(2, 1, 2, 2))
    assert meteor('a couch', 'a sofa', wordnet=OFF) == pytest.approx(score(1, 1, 2, 2))


def test_order_of_the_arguments():
    # Recall weighs nine times precision: a short hypothesis loses more than a long one.
    assert meteor('a red cup', 'cup', wordnet=OFF) < meteor('cup', 'a red cup', wordnet=OFF)


def test_agrees_with_nltk_on_the_same_tokens():
    reference, hypothesis = "The dog's red-brown leash.", 'the brown leash of a dog'
    tokens = ['the', "dog's", 'red', 'brown', 'leash']
    assert tokenize(reference) == tokens
    expected = meteor_score([tokens], hypothesis.split(), wordnet=OFF)
    assert meteor(reference, hypothesis, wordnet=OFF) == pytest.approx(expected)


def test_tokens():
    assert tokenize('A T-shirt, 2 cups; "Über" snake_case!') == [
        'a', 't', 'shirt', '2', 'cups', 'über', 'snake', 'case',
    ]  # fmt: skip
    assert tokenize(" ... '' ") == []


@pytest.mark.parametrize(
    ('reference', 'hypothesis'), [('', ''), ('a cat', ''), ('', 'a cat'), ('a cat', '...')]
)
def test_without_words_the_score_is_zero(reference, hypothesis):
    assert meteor(reference, hypothesis, wordnet=OFF) == 0.0


@pytest.fixture
def no_wordnet(monkeypatch, tmp_path):
    """Nltk finds data in an empty folder only."""
    monkeypatch.setattr('nltk.data.path', [str(tmp_path)])
    unloaded = LazyCorpusLoader('wordnet', WordNetCorpusReader, None)
    monkeypatch.setattr('nltk.corpus.wordnet', unloaded)
    return tmp_path


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(
        module, 'print_log', lambda text, logger, level: lines.append((level, text))
    )
    return lines


def test_auto_without_wordnet_says_so_once(no_wordnet, said):
    assert isinstance(load_wordnet('auto'), NoSynonyms)
    assert meteor('the cat', 'a cat') == 0.25
    assert len(said) == 1
    assert said[0][0] == logging.INFO
    assert 'exact and stem matches only: nltk finds no complete WordNet' in said[0][1]


def test_require_without_wordnet_names_the_fix(no_wordnet):
    with pytest.raises(LookupError, match='nltk.downloader wordnet'):
        load_wordnet('require')


@pytest.mark.filterwarnings('ignore:The multilingual functions')
def test_an_incomplete_wordnet_is_not_used(no_wordnet):
    folder = no_wordnet / 'corpora' / 'wordnet'
    folder.mkdir(parents=True)
    (folder / 'lexnames').write_text('00\tadj.all\t3\n')
    assert isinstance(load_wordnet('auto'), NoSynonyms)
    with pytest.raises(LookupError, match='incomplete or damaged.*data.adj'):
        load_wordnet('require')


def test_a_wordnet_that_answers_is_used(monkeypatch, said):
    stub = OneSynonymSet()
    monkeypatch.setattr('nltk.corpus.wordnet', stub)
    assert load_wordnet('require') is stub
    assert load_wordnet('auto') is stub
    assert meteor('a couch', 'a sofa') == pytest.approx(score(2, 1, 2, 2))
    assert isinstance(load_wordnet('off'), NoSynonyms)
    assert any('WordNet synonym matches' in text for _, text in said)


def test_another_mode_is_an_error():
    with pytest.raises(ValueError, match="'auto', 'require' or 'off', got 'on'"):
        load_wordnet('on')
