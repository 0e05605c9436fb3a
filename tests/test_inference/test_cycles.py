"""Both ways round on one photograph."""

from __future__ import annotations

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import GeneratedScenes
from projects.llava_sam2_rl.inference import (
    Sa2VA,
    mask_to_caption_to_mask,
    text_to_mask_to_caption,
)


@pytest.fixture(scope='module')
def model():
    return Sa2VA.from_pretrained('llava_sam2_rl://assets/sa2va_tiny', device='cpu')


@pytest.fixture(scope='module')
def scenes():
    plain = GeneratedScenes(length=8, split='val')
    return [plain[i]['sample'] for i in range(8)]


def test_the_way_back_is_what_the_model_finds_for_its_own_words(model, scenes):
    ious = []
    for scene in scenes:
        cycle = mask_to_caption_to_mask(model, scene.image, scene.mask)
        assert cycle.caption == model.describe(scene.image, scene.mask)
        returned = model.segment(scene.image, cycle.caption).mask
        assert np.array_equal(cycle.returned.mask, returned)
        both, either = (returned & scene.mask).sum(), (returned | scene.mask).sum()
        assert cycle.iou == pytest.approx(both / either)
        ious.append(cycle.iou)
    # README: 0.471 over 256 regions.
    assert 0.2 < np.mean(ious) < 0.8


def test_a_text_comes_back_as_a_caption_of_what_it_found(model, scenes):
    scores = []
    for scene in scenes:
        cycle = text_to_mask_to_caption(model, scene.image, scene.caption)
        assert cycle.found.found
        assert cycle.caption == model.describe(scene.image, cycle.found.mask)
        scores.append(cycle.meteor)
    # README: 0.416 over 256 regions.
    assert 0.2 < np.mean(scores) < 0.8


def test_no_caption_and_nothing_found_score_nothing(model, scenes, monkeypatch):
    scene = scenes[0]
    monkeypatch.setattr(model, 'describe', lambda image, mask: ' . ')
    cycle = mask_to_caption_to_mask(model, scene.image, scene.mask)
    assert (cycle.returned, cycle.iou) == (None, 0.0)

    generate = model.policy.generate
    monkeypatch.setattr(
        model.policy,
        'generate',
        lambda *a, **k: generate(*a, suppress_tokens=[model.policy.seg_token_id], **k),
    )
    text = text_to_mask_to_caption(model, scene.image, 'the dragon')
    assert (text.found.found, text.caption, text.meteor) == (False, None, 0.0)
