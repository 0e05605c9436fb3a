"""How two models' answers are compared."""

from __future__ import annotations

import math

import pytest
import torch

from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.sa2va.merged_answers import compare, probe


def test_two_tokens_by_hand():
    # Probabilities 1/2, 1/4, 1/4 and 1/3 each; written: 1/4, 1/4, 1/2 and the same.
    two = math.log(2)
    trained = torch.tensor([[two, 0.0, 0.0], [0.0, 0.0, 0.0]])
    written = torch.tensor([[0.0, 0.0, two], [0.0, 0.0, 0.0]])
    found = compare(trained, written, torch.tensor([0, 2]))
    assert found.tokens == 2
    assert found.logits == pytest.approx(2 * two / 6)
    # One value of log 2 among six: mean m = log 2 / 6, variance (5 m² + 25 m²) / 5.
    assert found.spread == pytest.approx(math.sqrt(6) * two / 6)
    # 1/2 log 2 - 1/4 log 2 at the first token, nothing at the second.
    assert found.divergence == pytest.approx(two / 8)
    assert found.same_token == 0.5
    assert found.trained_loss == pytest.approx((two + math.log(3)) / 2)
    assert found.written_loss == pytest.approx((2 * two + math.log(3)) / 2)
    assert '2 tokens' in str(found)
    assert 'the same at 50%' in str(found)


def test_the_question_is_one_a_model_is_asked():
    model = VideoLLaVASAMModel.from_pretrained('llava_sam2_rl://assets/sa2va_tiny')
    model.train()
    logits, targets = probe(model)
    assert model.training
    assert logits.dtype == torch.float32
    assert logits.shape == (len(targets), 1024)
    text = model.tokenizer.decode(targets)
    assert text.startswith('a woman in a red coat')
    assert text.endswith(model.chat_template.suffix)
    assert torch.equal(probe(model)[0], logits)


def test_a_model_without_a_tokenizer(golden_folder, golden_ids):
    model = VideoLLaVASAMModel.from_pretrained(golden_folder, special_token_ids=golden_ids)
    logits, targets = probe(model)
    assert len(logits) == len(targets) == 16
    assert not set(targets.tolist()) & set(golden_ids.values())
