"""Region captioning: how near a description comes to the one that a person wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.logging import print_log

from projects.llava_sam2_rl.evaluation.per_sample_rows import RowMetric
from projects.llava_sam2_rl.registry import METRICS
from projects.llava_sam2_rl.rewards.meteor import Synonyms, load_wordnet, meteor, tokenize


@METRICS.register_module()
class RegionCaptionMetric(RowMetric):
    """METEOR and, where the package ``pycocoevalcap`` is installed, CIDEr; source by source.

    METEOR is nltk's, see `rewards.meteor`; its values are not those of the METEOR 1.5 program.
    CIDEr takes its document frequencies from the references that are evaluated and its words from
    the same tokenizer as METEOR, not from the Java tokenizer of the COCO evaluation. Every record
    has one reference.

    Args:
        synonyms: See `rewards.meteor.load_wordnet`.
        **kwargs: See `RowMetric`.
    """

    default_prefix = 'captioning'
    task = 'captioning'

    def __init__(self, synonyms: Synonyms = 'auto', **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.wordnet = load_wordnet(synonyms)
        if _cider() is None:
            print_log('CIDEr is left out: install pycocoevalcap', logger='current')

    def row(self, meta: Any, prediction: Any) -> dict[str, Any]:
        """Scores one description (``caption``, ``reference``)."""
        caption, reference = prediction['caption'], prediction['reference']
        scored = reference is not None and tokenize(reference)
        score = meteor(reference, caption, wordnet=self.wordnet) if scored else None
        return {'caption': caption, 'reference': reference, 'meteor': score}

    def summarise(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """``{source}/{number}``; ``no_reference`` counts what could not be scored."""
        numbers: dict[str, float] = {}
        for source, own in self.by_source(rows).items():
            scored = [row for row in own if row['meteor'] is not None]
            if scored:
                numbers[f'{source}/meteor'] = float(np.mean([row['meteor'] for row in scored]))
                captions = [row['caption'] for row in scored]
                score = cider(captions, [row['reference'] for row in scored])
                if score is not None:
                    numbers[f'{source}/cider'] = score
            numbers[f'{source}/no_reference'] = len(own) - len(scored)
            numbers[f'{source}/num_samples'] = len(own)
        return numbers


def cider(captions: list[str], references: list[str]) -> float | None:
    """CIDEr-D (Vedantam et al. 2015) of N captions with one reference each, in [0, 10].

    Returns:
        The mean, or ``None`` where ``pycocoevalcap`` is not installed.
    """
    scorer = _cider()
    if scorer is None:
        return None
    hypotheses = {i: [' '.join(tokenize(text))] for i, text in enumerate(captions)}
    truths = {i: [' '.join(tokenize(text))] for i, text in enumerate(references)}
    return float(scorer.compute_score(truths, hypotheses)[0])


def _cider() -> Any:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return None
    return Cider()
