"""Plain supervision: whose caption is segmented, and what needs a reference."""

from __future__ import annotations

import pytest
import torch

from projects.llava_sam2_rl.models import DualLoopModel, SFTObjective
from projects.llava_sam2_rl.models.captioning import caption_loss, write_captions
from projects.llava_sam2_rl.models.objectives import sft
from test_models.batches import encode, randomize_lora


def losses_of(model, encoded):
    torch.manual_seed(0)
    return model.objective.losses(model.policy, encoded, model.rollout(encoded))


def test_the_teacher_writes_the_caption(tiny_model, batch, monkeypatch):
    seen = []

    def spy(policy, encoded, *args, **options):
        seen.append(next(p for n, p in policy.named_parameters() if 'lora_B' in n)[0, 0].item())
        return write_captions(policy, encoded, *args, **options)

    monkeypatch.setattr(sft, 'write_captions', spy)
    with torch.no_grad():
        for name, parameter in tiny_model.policy.named_parameters():
            if 'lora_B' in name:
                parameter.fill_(0.125)
    tiny_model(**batch, mode='loss')
    assert seen == [0.0]  # the policy's is 0.125


def test_the_policy_segments_what_was_written(tiny_model, batch):
    encoded = encode(tiny_model, batch)
    with tiny_model.teacher_applied():
        expected = write_captions(tiny_model.policy, encoded, tiny_model.max_new_tokens)
    randomize_lora(tiny_model.policy, 0.5)
    rollout = tiny_model.rollout(encoded)['mask_to_caption']
    assert rollout.captions == expected
    assert list(rollout.samples) == [0, 1, 2]
    assert write_captions(tiny_model.policy, encoded, tiny_model.max_new_tokens) != expected


def test_samples_without_caption_take_no_part_in_the_second_direction(tiny_model, batch):
    data = {**batch['data'], 'captions': [None] * 3}
    losses = tiny_model(data, batch['data_samples'], mode='loss')
    assert {key for key in losses if 'loss' in key} == {'loop1/mask_loss', 'loop1/answer_loss'}


def test_losses_count_what_they_are_means_of(tiny_model, batch):
    encoded = encode(tiny_model, batch)
    losses, metrics = losses_of(tiny_model, encoded)
    tokens = caption_loss(tiny_model.policy, encoded, encoded.captioned).count
    assert {key: int(loss.count) for key, loss in losses.items()} == {
        'loop1/mask_loss': 3,
        'loop1/answer_loss': 3,
        'loop1/caption_loss': int(tokens),
        'loop2/mask_loss': 2,
        'loop2/answer_loss': 2,
    }
    assert metrics['loop1/empty_captions'] == 0


def test_captions_without_a_word_are_counted(tiny_model, batch, monkeypatch):
    monkeypatch.setattr(sft, 'write_captions', lambda *_, **__: ['', 'a red cross', ''])
    _, metrics = losses_of(tiny_model, encode(tiny_model, batch))
    assert metrics['loop1/empty_captions'] == 2


@pytest.mark.parametrize(
    ('options', 'factors'),
    [
        (dict(mask_weight=2.0), {'loop1/mask_loss': 2, 'loop2/mask_loss': 2}),
        (dict(return_weight=0.5), {'loop1/mask_loss': 0.5, 'loop1/answer_loss': 0.5}),
        (dict(answer_weight=0.2), {'loop1/answer_loss': 2, 'loop2/answer_loss': 2}),
        (dict(caption_weight=3.0), {'loop1/caption_loss': 3}),
    ],
)
def test_each_weight_scales_its_losses(tiny_model, batch, options, factors):
    plain, scaled = (
        DualLoopModel(tiny_model.policy, SFTObjective(**x), max_new_tokens=12).eval()
        for x in ({}, options)
    )
    encoded = encode(plain, batch)
    expected, _ = losses_of(plain, encoded)
    found, _ = losses_of(scaled, encoded)
    assert found.keys() == expected.keys()
    for key, loss in expected.items():
        torch.testing.assert_close(found[key].value, factors.get(key, 1) * loss.value)


@pytest.mark.parametrize('weight', ['caption_weight', 'answer_weight'])
def test_weight_zero_is_no_loss(tiny_model, batch, weight):
    model = DualLoopModel(tiny_model.policy, SFTObjective(**{weight: 0.0}), max_new_tokens=4)
    losses, _ = losses_of(model, encode(model, batch))
    assert not any(weight.split('_')[0] in key for key in losses)
