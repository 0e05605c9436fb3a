"""What stops a run before a language model that masks wrongly is used."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import transformers

from projects.llava_sam2_rl.models import group_cache
from projects.llava_sam2_rl.models.sa2va import language, self_test
from projects.llava_sam2_rl.models.sa2va.internvl import LANGUAGE_MODELS
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.sa2va.self_test import check_language_model
from projects.llava_sam2_rl.utils.errors import StackError

QWEN = 'Qwen2ForCausalLM'


@pytest.fixture(autouse=True)
def not_checked_yet():
    check_language_model.cache_clear()
    yield
    check_language_model.cache_clear()


@pytest.fixture
def attention_without_a_mask(monkeypatch):
    """Sampling whose attention sees all that lies in its row."""
    bias = group_cache.GroupCache.next_bias
    monkeypatch.setattr(
        group_cache.GroupCache, 'next_bias', lambda self: torch.zeros_like(bias(self))
    )


def stopped(architecture: str = QWEN) -> tuple[str, float]:
    with pytest.raises(StackError) as error:
        check_language_model(architecture)
    text = str(error.value)
    assert '\n' not in text
    assert f'{architecture} of transformers {transformers.__version__} gives wrong' in text
    return text, float(text.split('differs by ')[1].split()[0])


@pytest.mark.parametrize('architecture', list(LANGUAGE_MODELS))
def test_every_language_model_passes_by_far(architecture):
    check_language_model(architecture)
    with torch.no_grad():
        found = self_test.measure(self_test._TinyModel(architecture))
    assert len(found) == 4
    assert max(found.values()) < 1e-4


def test_nothing_random_and_no_default_is_changed():
    state = torch.get_rng_state()
    with torch.device('meta'), torch.autocast('cpu', torch.bfloat16):
        check_language_model(QWEN)
        assert torch.empty(0).is_meta
        assert torch.is_autocast_enabled('cpu')
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('architecture', [QWEN, 'Phi3ForCausalLM'])
def test_an_attention_without_a_mask(attention_without_a_mask, architecture):
    text, difference = stopped(architecture)
    assert 'sampling behind a cache' in text
    assert difference > 0.1


@contextmanager
def no_mask_function(name):
    """Transformers from 4.53 on give no mask, and no error, where an attention's name has none."""
    masks = pytest.importorskip('transformers.masking_utils', reason='from 4.53 on')
    known = masks.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    function = known.pop(name)
    try:
        yield
    finally:
        known[name] = function


def test_a_name_without_a_mask_function():
    """The cause itself, where transformers has mask functions."""
    with no_mask_function('sdpa'):
        text, difference = stopped()
    assert 'padding on the left' in text
    assert difference > 0.1


def test_sampling_brings_its_own_masks():
    with no_mask_function(group_cache._FOLDED):
        check_language_model(QWEN)


@pytest.mark.parametrize(
    ('dimensions', 'path'), [(2, 'padding on the left'), (3, 'the tree of sequences')]
)
def test_masks_that_do_not_arrive(monkeypatch, dimensions, path):
    original = language.hidden_states

    def unmasked(model, embeds, mask, *args):
        if mask.ndim == dimensions:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
        return original(model, embeds, mask, *args)

    monkeypatch.setattr(language, 'hidden_states', unmasked)
    text, difference = stopped()
    assert path in text
    assert difference > 0.1


def test_a_result_that_is_no_number(monkeypatch):
    monkeypatch.setattr(self_test, 'measure', lambda model: {'a path': float('nan')})
    text, _ = stopped()
    assert 'a path differs by nan' in text


def test_a_model_is_tried_when_it_is_built_once(monkeypatch, golden_folder, golden_ids):
    tried = []
    measure = self_test.measure
    monkeypatch.setattr(self_test, 'measure', lambda model: tried.append(1) or measure(model))
    for _ in range(2):
        VideoLLaVASAMModel.from_pretrained(golden_folder, special_token_ids=golden_ids)
    assert tried == [1]


def test_no_model_is_built_that_would_be_wrong(attention_without_a_mask, golden_folder, golden_ids):
    for _ in range(2):  # nor at the second time
        with pytest.raises(StackError, match='sampling behind a cache'):
            VideoLLaVASAMModel.from_pretrained(golden_folder, special_token_ids=golden_ids)
