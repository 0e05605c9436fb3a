"""METEOR of one caption against one reference, by nltk."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any, Literal

from mmengine.logging import print_log

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards.base import RolloutBatch

# nltk is imported where a caption is scored: every start would wait for it.

# A word: letters and digits, with apostrophes inside ("dog's"). Hyphens part words; punctuation
# is dropped.
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")

Synonyms = Literal['auto', 'require', 'off']


class NoSynonyms:
    """Stands in for WordNet where synonyms are off: words match exactly or by their stem."""

    def synsets(self, word: str) -> list[Any]:
        """No synonym set for any word."""
        return []


def tokenize(text: str) -> list[str]:
    """Lower-cased words of ``text``: runs of letters and digits, apostrophes inside kept."""
    return _WORD.findall(text.lower())


def meteor(reference: str, hypothesis: str, *, wordnet: Any = None) -> float:
    """METEOR with nltk's parameters (alpha 0.9, beta 3, gamma 0.5; Lavie & Agarwal, 2007).

    nltk stems before it looks for synonyms, so the values differ from those of the METEOR 1.5
    program (``pycocoevalcap``); never put the two in one table. Captions that are equal score
    ``1 - 0.5 / m^3`` for m words, not 1: the one chunk is penalised.

    Args:
        reference: What a person wrote.
        hypothesis: What is scored.
        wordnet: From :func:`load_wordnet`; ``load_wordnet('auto')`` where ``None``.

    Returns:
        A number in [0, 1]. 0 where either text has no word, also where both have none: an empty
        caption never earns anything.
    """
    from nltk.translate.meteor_score import single_meteor_score

    synonyms = load_wordnet('auto') if wordnet is None else wordnet
    return float(single_meteor_score(tokenize(reference), tokenize(hypothesis), wordnet=synonyms))


@functools.cache
def load_wordnet(synonyms: Synonyms = 'auto') -> Any:
    """Where METEOR's synonyms come from. Nothing is downloaded; the log says once what is used.

    Args:
        synonyms: ``'auto'``: WordNet where nltk finds a complete one, otherwise none.
            ``'require'``: WordNet or an error. ``'off'``: none, the same on every machine.

    Returns:
        An object with ``synsets(word)``.

    Raises:
        LookupError: ``'require'`` and there is no complete WordNet.
        ValueError: Another value of ``synonyms``.
    """
    if synonyms not in ('auto', 'require', 'off'):
        raise ValueError(f"synonyms must be 'auto', 'require' or 'off', got {synonyms!r}")
    if synonyms == 'off':
        _say('exact and stem matches only (synonyms off)')
        return NoSynonyms()
    from nltk.corpus import wordnet

    problem = _why_unusable(wordnet)
    if problem is None:
        _say('exact, stem and WordNet synonym matches')
        return wordnet
    if synonyms == 'require':
        raise LookupError(
            f'METEOR needs WordNet but nltk finds no complete one ({problem}). Run `python -m '
            "nltk.downloader wordnet`, or set synonyms='off' for exact and stem matches only"
        )
    _say(f'exact and stem matches only: nltk finds no complete WordNet ({problem})')
    return NoSynonyms()


def _why_unusable(wordnet: Any) -> str | None:
    """Loads the corpus (also so that threads that score later find it loaded) and asks for a word.

    Returns:
        ``None`` where it answers, otherwise what is wrong.
    """
    from nltk.corpus.reader.wordnet import WordNetError

    try:
        wordnet.ensure_loaded()
        return None if wordnet.synsets('dog') else 'it has no entry for "dog"'
    except LookupError:
        return "corpora/wordnet is in none of nltk's data folders"
    except (OSError, ValueError, AssertionError, WordNetError) as error:
        return f'it is incomplete or damaged: {error}'


def _say(mode: str) -> None:
    print_log(f'METEOR: {mode}', logger='current', level=logging.INFO)


@REWARDS.register_module()
class MeteorReward:
    """METEOR of the completion against the reference caption; declines where there is none.

    Args:
        synonyms: Where synonyms come from: ``'auto'``, ``'require'`` or ``'off'``, see
            :func:`load_wordnet`; said in the log at start. Defaults to ``'auto'``.

    Raises:
        LookupError: ``synonyms='require'`` and there is no complete WordNet.
    """

    name = 'meteor'
    needs = ('completions',)

    def __init__(self, synonyms: Synonyms = 'auto') -> None:
        self.synonyms = synonyms
        load_wordnet(synonyms)

    def __call__(self, rollouts: RolloutBatch) -> list[float | None]:
        """A number in [0, 1] per completion, ``None`` without a word of reference."""
        wordnet = load_wordnet(self.synonyms)
        references = rollouts.references or [None] * len(rollouts)
        completions = rollouts.required('completions', self)
        return [
            meteor(reference, completion, wordnet=wordnet)
            if reference is not None and tokenize(reference)
            else None
            for reference, completion in zip(references, completions, strict=True)
        ]
