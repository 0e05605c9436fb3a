"""The differentiable caption: where its tokens come from, and where gradients go."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.logging import MessageHub

from projects.llava_sam2_rl.losses import mask_loss
from projects.llava_sam2_rl.models import DualLoopModel, GumbelObjective
from projects.llava_sam2_rl.models.captioning import caption_logits, caption_loss, write_captions
from projects.llava_sam2_rl.models.objectives import Rollout, gumbel
from projects.llava_sam2_rl.models.segmentation import segment_descriptions
from projects.llava_sam2_rl.models.segmentation_losses import find_masks, segmentation_losses
from test_models.batches import encode


def build(tiny_model, wrapper=None, **options) -> DualLoopModel:
    """``wrapper``: options of `DualLoopModel`; all others are the objective's."""
    model = DualLoopModel(
        tiny_model.policy, GumbelObjective(**options), max_new_tokens=12, **(wrapper or {})
    )
    model.eval()
    return model


def step(model, encoded):
    """Losses, unweighted, and metrics of one batch."""
    rollouts = model.rollout(encoded)
    return model.objective.losses(model.policy, encoded, rollouts)


def pseudo_ids(model, encoded) -> list[list[int]]:
    """What the teacher writes."""
    found = model.objective.rollout(model.policy, model.teacher, encoded)
    return found['mask_to_caption'].pseudo_ids


def written(*ids: list[int]) -> Rollout:
    """As if the teacher had written these, with nothing replaced."""
    return Rollout(samples=range(len(ids)), pseudo_ids=ids, noised_ids=ids)


def gradients(model, parts=('mlp1', 'lora_')) -> dict[str, float]:
    found = dict.fromkeys(parts, 0.0)
    for name, parameter in model.policy.named_parameters():
        for part in parts:
            if part in name and parameter.grad is not None:
                found[part] = max(found[part], float(parameter.grad.abs().max()))
    return found


def through_a_second_model(model, encoded, captions) -> torch.Tensor:
    """The mask loss of a return trip by a model that is not the policy."""
    reader = copy.deepcopy(model.policy)
    found = find_masks(
        reader, encoded, captions, encoded.target_image, encoded.target_masks, encoded.names,
        answer_loss=False,
    )  # fmt: skip
    losses, _ = segmentation_losses([found], mask_weight=1.0, answer_weight=0.0, num_points=500)
    return losses['mask_loss'].value


def test_the_mask_loss_reaches_the_policy_through_the_caption_alone(tiny_model, batch):
    model = build(tiny_model)
    encoded = encode(model, batch)
    rollout = model.rollout(encoded)['mask_to_caption']
    captions = model.objective.caption_embeds(model.policy, encoded, rollout)[0].embeds

    through_a_second_model(model, encoded, [x.detach() for x in captions]).backward()
    assert gradients(model) == {'mlp1': 0.0, 'lora_': 0.0}

    through_a_second_model(model, encoded, captions).backward()
    found = gradients(model)
    assert found['mlp1'] > 0
    assert found['lora_'] > 0


def test_no_gradient_reaches_the_teacher(tiny_model, batch):
    model = build(tiny_model)
    losses, _ = step(model, encode(model, batch))
    sum(loss.value for loss in losses.values()).backward()
    shadows = model.teacher.state_dict()['shadows'].values()
    assert all(not shadow.requires_grad and shadow.grad is None for shadow in shadows)


def test_the_teacher_writes_the_pseudo_tokens(tiny_model, batch):
    model = build(tiny_model)
    encoded = encode(model, batch)
    with torch.no_grad():
        for name, parameter in model.policy.named_parameters():
            if 'lora_B' in name:
                parameter.normal_()  # the policy by itself writes something else now
    with model.teacher_applied():
        expected = write_captions(model.policy, encoded, 12)
    pseudo = pseudo_ids(model, encoded)
    assert [model.policy.tokenizer.decode(ids) for ids in pseudo] == expected
    assert write_captions(model.policy, encoded, 12) != expected


def test_a_pseudo_caption_can_be_made_longer_but_not_beyond_the_limit(tiny_model, batch):
    model = build(tiny_model)
    encoded = encode(model, batch)
    plain = [len(ids) for ids in pseudo_ids(model, encoded)]
    model.objective.min_pseudo_tokens = max(plain) + 2
    longer = [len(ids) for ids in pseudo_ids(model, encoded)]
    assert all(length >= max(plain) + 2 for length in longer)
    assert min(plain) < max(plain) + 2
    model.objective.max_new_tokens = 3
    model.objective.min_pseudo_tokens = 0
    assert [len(ids) for ids in pseudo_ids(model, encoded)] == [3, 3, 3]


def test_the_forward_pass_reads_the_picked_tokens_own_embeddings(tiny_model, batch):
    model = build(tiny_model)
    encoded = encode(model, batch)
    rollout = written([30, 31, 32], [], [50, 51])
    captions, _, metrics = model.objective.caption_embeds(model.policy, encoded, rollout)
    ids = captions.token_ids
    assert [len(x) for x in ids] == [3, 0, 2]
    assert metrics['empty_captions'] == 1
    table = model.policy.language_model.get_input_embeddings().weight
    for rows, tokens in zip(captions.embeds, ids, strict=True):
        assert torch.equal(rows, table[torch.tensor(tokens, dtype=torch.long)])


def test_the_mask_loss_says_whether_to_end_earlier(tiny_model, batch, monkeypatch):
    """The gradient of the ends' logits flows through the length alone: no end is ever picked."""
    found = {}
    for learn in (True, False):
        model = build(tiny_model, learn_length=learn, beta=0.0)
        encoded = encode(model, batch)
        logits = []

        def keep(*args, logits=logits):
            logits.append(caption_logits(*args))
            logits[-1].retain_grad()
            return logits[-1]

        monkeypatch.setattr(gumbel, 'caption_logits', keep)
        found_losses, _ = step(model, encoded)
        found_losses['loop1/mask_loss'].value.backward()
        ends = model.objective._stop_starts
        found[learn] = float(logits[0].grad[:, ends].abs().max())
    assert found[True] > 0
    assert found[False] == 0


def test_the_kl_is_to_the_teacher_and_zero_at_the_start(tiny_model, batch, monkeypatch):
    model = build(tiny_model, wrapper=dict(caption_to_mask=dict(weight=0)), beta=0.5)
    encoded = encode(model, batch)
    losses, _metrics = step(model, encoded)
    assert losses['loop1/kl_loss'].value.item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in model.policy.named_parameters():
            if 'lora_B' in name:
                parameter.normal_(std=0.02)
    rows, given = [0, 2], [[30, 31, 32], [50]]
    policy = caption_logits(model.policy, encoded, rows, given).softmax(-1)
    with model.teacher_applied():
        teacher = caption_logits(model.policy, encoded, rows, given).softmax(-1)
    expected = (policy * (policy / teacher).log()).sum(-1).mean()
    model.objective.mask_ratio = 0.0
    monkeypatch.setattr(model.objective, '_pseudo_ids', lambda *_: [[30, 31, 32], [], [50]])
    rollout = model.rollout(encoded)['mask_to_caption']
    assert rollout.noised_ids == [[30, 31, 32], [], [50]]
    _, kl, _ = model.objective.caption_embeds(model.policy, encoded, rollout)
    assert kl.value.item() == pytest.approx(float(expected), rel=1e-4)
    assert float(kl.value) > 0
    # A mean over the tokens.
    assert kl.count == 4


def test_no_marker_is_ever_drawn_or_picked(tiny_model, batch):
    model = build(tiny_model, mask_ratio=1.0)
    tokenizer = model.policy.tokenizer
    markers = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    assert markers
    assert not markers & set(model.objective._ordinary.tolist())
    encoded = encode(model, batch)
    # A head that wants nothing but [SEG].
    seg = model.policy.seg_token_id
    head = model.policy.lm_head
    bias = torch.zeros(head.weight.shape[0])
    bias[seg] = 1e4
    handle = head.register_forward_hook(lambda _, __, out: out + bias)
    try:
        rollout = written([30, 31], [40], [50])
        captions, _, _ = model.objective.caption_embeds(model.policy, encoded, rollout)
    finally:
        handle.remove()
    assert not {token for row in captions.token_ids for token in row} & markers


def test_empty_captions_give_a_mask_loss_with_an_empty_description(tiny_model, batch, monkeypatch):
    model = build(tiny_model, wrapper=dict(caption_to_mask=dict(weight=0)))
    monkeypatch.setattr(gumbel, 'write_captions', lambda *_, **__: ['', 'a red cross', ''])
    losses, metrics = step(model, encode(model, batch))
    assert metrics['loop1/empty_captions'] == 2
    assert all(torch.isfinite(loss.value) for loss in losses.values())
    monkeypatch.setattr(gumbel, 'write_captions', lambda *_, **__: ['', '', ''])
    encoded = encode(model, batch)
    torch.manual_seed(0)
    losses, metrics = step(model, encoded)
    assert metrics['loop1/empty_captions'] == 3
    low_res, _ = segment_descriptions(
        model.policy, encoded, [torch.zeros(0, 128)] * 3, encoded.target_image, encoded.names
    )
    torch.manual_seed(0)
    expected, _ = mask_loss(low_res, encoded.target_masks)
    assert float(losses['loop1/mask_loss'].value) == pytest.approx(float(expected), rel=0.02)
    sum(loss.value for loss in losses.values()).backward()


def test_the_weight_of_the_return_trip_spares_the_way_through_the_caption(tiny_model, batch):
    found = {}
    for weight in (1.0, 0.25):
        model = build(
            tiny_model,
            wrapper=dict(caption_to_mask=dict(weight=0)),
            return_weight=weight,
            answer_weight=0.0,
        )
        encoded = encode(model, batch)
        kept = []
        make = model.objective.caption_embeds

        def keep(*args, make=make, kept=kept):
            result = make(*args)
            for rows in (*result[0].embeds, *result[0].weights):
                rows.retain_grad()
                kept.append(rows)
            return result

        model.objective.caption_embeds = keep
        model.zero_grad()
        torch.manual_seed(0)
        losses, _ = step(model, encoded)
        losses['loop1/mask_loss'].value.backward()
        head = model.policy.text_hidden_fcs[2].weight.grad.clone()
        lora = [p.grad for n, p in model.policy.named_parameters() if 'lora_B' in n]
        found[weight] = (head, torch.cat([rows.grad.flatten() for rows in kept]), lora)
    # What reads the caption learns a quarter; the caption's embeddings pass all of it on.
    torch.testing.assert_close(found[0.25][0], 0.25 * found[1.0][0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found[0.25][1], found[1.0][1], rtol=1e-3, atol=1e-7)
    # LoRA takes part in both passes: g = reader + caption; with a quarter: reader / 4 + caption.
    whole = torch.cat([g.flatten() for g in found[1.0][2]])
    part = torch.cat([g.flatten() for g in found[0.25][2]])
    reader = (whole - part) / 0.75
    assert reader.abs().max() > 0
    assert (part - 0.25 * reader).abs().max() > 1e-6


def test_the_second_direction_teaches_the_mask_decoder_through_the_region(tiny_model, batch):
    model = build(tiny_model, wrapper=dict(mask_to_caption=dict(weight=0)))
    encoded = encode(model, batch)
    losses, metrics = step(model, encoded)
    assert set(losses) == {'loop2/caption_loss'}
    assert metrics['loop2/empty_masks'] == 0
    losses['loop2/caption_loss'].value.backward()
    found = gradients(model, ('mlp1', 'lora_', 'text_hidden_fcs', 'sam_mask_decoder'))
    assert all(value > 0 for value in found.values()), found


def test_the_straight_through_factor_is_one_going_forward(tiny_model, batch, monkeypatch):
    model = build(tiny_model, wrapper=dict(mask_to_caption=dict(weight=0)))
    encoded = encode(model, batch)
    seen = {}

    def spy(policy, batch, samples, grids, factors):
        seen.update(samples=samples, factors=factors)
        seen['plain'] = caption_loss(policy, batch, samples, grids).value
        return caption_loss(policy, batch, samples, grids, factors)

    monkeypatch.setattr(gumbel, 'caption_loss', spy)
    losses, _ = step(model, encoded)
    assert seen['samples'] == [0, 1]  # the third has no caption
    assert all(torch.equal(f, torch.ones_like(f)) for f in seen['factors'])
    assert float(losses['loop2/caption_loss'].value) == pytest.approx(
        float(seen['plain']), abs=1e-6
    )


def test_masks_that_come_out_empty_are_counted(tiny_model, batch, monkeypatch):
    model = build(tiny_model, wrapper=dict(mask_to_caption=dict(weight=0)))
    encoded = encode(model, batch)

    def nothing(*args, **kwargs):
        low_res, loss = segment_descriptions(*args, **kwargs)
        return low_res * 0 - 5, loss

    monkeypatch.setattr(gumbel, 'segment_descriptions', nothing)
    losses, metrics = step(model, encoded)
    assert metrics['loop2/empty_masks'] == 2
    assert float(losses['loop2/caption_loss'].value) == 0
    # The mean of none: the captions of other ranks are averaged without it.
    assert losses['loop2/caption_loss'].count == 0
    losses['loop2/caption_loss'].value.backward()


def test_the_temperature_follows_the_runners_iteration(tiny_model, batch):
    model = build(tiny_model, tau=dict(start=2.0, end=0.5, steps=100), top_k=8)
    encoded = encode(model, batch)
    hub = MessageHub.get_current_instance()
    try:
        for iteration, expected in ((0, 2.0), (50, 1.0), (5000, 0.5)):
            hub.update_info('iter', iteration)
            _, metrics = step(model, encoded)
            assert metrics['loop1/tau'] == pytest.approx(expected)
    finally:
        hub.runtime_info.pop('iter')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(tau=0), 'tau: start and end must be positive'),
        (dict(tau=dict(start=1.0, end=-1.0, steps=3)), 'tau: start and end must be positive'),
        (dict(tau=dict(start=1.0, end=0.5, steps=0)), 'steps must be at least 1'),
        (dict(mask_ratio=1.5), r'mask_ratio must lie in \[0, 1\]'),
        (dict(top_k=0), 'top_k must be at least 1'),
        (dict(return_weight=0), 'return_weight must be positive'),
        (dict(beta=-1.0), 'beta must not be negative'),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        GumbelObjective(**options)


def test_more_candidates_than_words_is_an_error_of_the_config(tiny_model):
    with pytest.raises(ValueError, match=r'top_k=1024 exceeds the \d+ ordinary tokens'):
        build(tiny_model, top_k=1024)


def test_the_teacher_reads_what_the_policy_reads(tiny_model, batch):
    """The KL compares two models on the same noised caption; without it no pass is made."""
    torch.manual_seed(0)
    model = build(tiny_model, mask_ratio=0.5)
    encoded = encode(model, batch)
    rollout = model.rollout(encoded)['mask_to_caption']
    assert [len(ids) for ids in rollout.noised_ids] == [len(ids) for ids in rollout.pseudo_ids]
    assert rollout.noised_ids != rollout.pseudo_ids
    with torch.no_grad(), model.teacher_applied():
        logits = caption_logits(model.policy, encoded, [0, 1, 2], rollout.noised_ids)
    torch.testing.assert_close(rollout.ref_logps, logits.log_softmax(-1), atol=1e-5, rtol=1e-4)
    assert build(tiny_model, beta=0.0).rollout(encoded)['mask_to_caption'].ref_logps is None
