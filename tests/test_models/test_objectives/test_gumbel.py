"""The differentiable caption: where its tokens come from, and where gradients go."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.losses import mask_loss
from projects.llava_sam2_rl.models import DualLoopModel, GumbelObjective
from projects.llava_sam2_rl.models.objectives.segmentation import segmentation_losses
from projects.llava_sam2_rl.prompts import encode_prompt, segmentation_prompt
from projects.llava_sam2_rl.registry import TRANSFORMS


@pytest.fixture(scope='module')
def batch(tiny_config) -> dict:
    """Three samples; the second has a second frame, the third no caption."""
    transform = TRANSFORMS.build(tiny_config.val_dataloader.dataset.transforms)
    plain = GeneratedScenes(length=8, split='val', transforms=transform)
    paired = GeneratedScenes(length=8, split='val', paired=True, transforms=transform)
    collated = sa2va_collate([plain[0], paired[0], plain[1]])
    collated['data']['captions'][2] = None
    return collated


def build(tiny_loop, loop=None, **options) -> DualLoopModel:
    model = DualLoopModel(
        tiny_loop.policy, GumbelObjective(**options), max_new_tokens=12, **(loop or {})
    )
    model.eval()
    return model


def encode(loop, batch):
    return loop.encode(batch['data'], [meta.name for meta in batch['data_samples']])


def gradients(loop, parts=('mlp1', 'lora_')) -> dict[str, float]:
    found = dict.fromkeys(parts, 0.0)
    for name, parameter in loop.policy.named_parameters():
        for part in parts:
            if part in name and parameter.grad is not None:
                found[part] = max(found[part], float(parameter.grad.abs().max()))
    return found


def through_a_second_model(loop, encoded, captions) -> torch.Tensor:
    """The mask loss of a return trip by a model that is not the policy."""
    reader = copy.deepcopy(loop)
    losses, _, _ = segmentation_losses(
        reader, encoded, captions, encoded.target_image, encoded.target_masks, encoded.names,
        mask_weight=1.0, answer_weight=0.0, num_points=500,
    )  # fmt: skip
    return losses['mask_loss']


def test_the_mask_loss_reaches_the_policy_through_the_caption_alone(tiny_loop, batch):
    loop = build(tiny_loop)
    encoded = encode(loop, batch)
    pseudo = loop.objective.pseudo_tokens(loop, encoded)
    captions = loop.objective.caption_embeds(loop, encoded, pseudo)[0].embeds

    through_a_second_model(loop, encoded, [x.detach() for x in captions]).backward()
    assert gradients(loop) == {'mlp1': 0.0, 'lora_': 0.0}

    through_a_second_model(loop, encoded, captions).backward()
    found = gradients(loop)
    assert found['mlp1'] > 0
    assert found['lora_'] > 0


def test_no_gradient_reaches_the_teacher(tiny_loop, batch):
    loop = build(tiny_loop)
    losses, _ = loop.objective(loop, encode(loop, batch))
    sum(losses.values()).backward()
    shadows = loop.teacher.state_dict()['shadows'].values()
    assert all(not shadow.requires_grad and shadow.grad is None for shadow in shadows)


def test_the_teacher_writes_the_pseudo_tokens(tiny_loop, batch):
    loop = build(tiny_loop)
    encoded = encode(loop, batch)
    with torch.no_grad():
        for name, parameter in loop.policy.named_parameters():
            if 'lora_B' in name:
                parameter.normal_()  # the policy by itself writes something else now
    with loop.teacher_applied():
        expected = loop.write_captions(encoded)
    pseudo = loop.objective.pseudo_tokens(loop, encoded)
    assert [loop.policy.tokenizer.decode(ids) for ids in pseudo] == expected
    assert loop.write_captions(encoded) != expected


def test_a_pseudo_caption_can_be_made_longer_but_not_beyond_the_limit(tiny_loop, batch):
    loop = build(tiny_loop)
    encoded = encode(loop, batch)
    plain = [len(ids) for ids in loop.objective.pseudo_tokens(loop, encoded)]
    loop.objective.min_pseudo_tokens = max(plain) + 2
    longer = [len(ids) for ids in loop.objective.pseudo_tokens(loop, encoded)]
    assert all(length >= max(plain) + 2 for length in longer)
    assert min(plain) < max(plain) + 2
    loop.max_new_tokens = 3
    loop.objective.min_pseudo_tokens = 0
    assert [len(ids) for ids in loop.objective.pseudo_tokens(loop, encoded)] == [3, 3, 3]


def test_position_t_predicts_token_t_whatever_the_prompts_length(tiny_loop, batch):
    loop = build(tiny_loop)
    encoded = encode(loop, batch)
    policy = loop.policy
    captions = [[30, 31, 32], [40], [50, 51, 52, 53, 54]]
    together = loop.objective.caption_logits(loop, encoded, [0, 1, 2], captions)
    start = 0
    for i, ids in enumerate(captions):
        prompt = encode_prompt(policy.tokenizer, loop.region_text(encoded, i))
        # The model's own forward on this sample alone; logits[n] predicts token n + 1.
        single = {
            'input_ids': torch.tensor([prompt + ids]),
            'attention_mask': torch.ones(1, len(prompt) + len(ids), dtype=torch.bool),
            'pixel_values': [batch['data']['pixel_values'][i]],
            'vp_overall_mask': torch.tensor([True]),
            'prompt_masks': [batch['data']['prompt_masks'][i]],
        }
        logits = policy.forward(single, mode='tensor')['logits'][0]
        expected = logits[len(prompt) - 1 : len(prompt) + len(ids) - 1]
        torch.testing.assert_close(together[start : start + len(ids)], expected, rtol=0, atol=2e-5)
        start += len(ids)
    assert start == len(together)


def test_the_forward_pass_reads_the_picked_tokens_own_embeddings(tiny_loop, batch):
    loop = build(tiny_loop)
    encoded = encode(loop, batch)
    pseudo = [[30, 31, 32], [], [50, 51]]
    captions, _, metrics = loop.objective.caption_embeds(loop, encoded, pseudo)
    ids = captions.token_ids
    assert [len(x) for x in ids] == [3, 0, 2]
    assert metrics['empty_captions'] == 1
    table = loop.policy.language_model.get_input_embeddings().weight
    for rows, tokens in zip(captions.embeds, ids, strict=True):
        assert torch.equal(rows, table[torch.tensor(tokens, dtype=torch.long)])


def test_spliced_embeddings_are_read_where_the_description_stands(tiny_loop, batch):
    loop = build(tiny_loop)
    encoded = encode(loop, batch)
    policy, tokenizer = loop.policy, loop.policy.tokenizer
    ids = [encode_prompt(tokenizer, text) for text in ('a small red cross', 'a circle')]
    table = policy.language_model.get_input_embeddings().weight
    spliced = [table[torch.tensor(tokens)] for tokens in ids]
    found, _ = loop.seg_prompts(encoded, spliced, [0, 1], ['a', 'b'])
    for i, tokens in enumerate(ids):
        text = segmentation_prompt(encoded.features.num_tiles[i] * policy.num_image_tokens, '@@')
        before, behind = text.split('@@')
        whole = (
            encode_prompt(tokenizer, before)
            + tokens
            + encode_prompt(tokenizer, behind)
            + encode_prompt(tokenizer, 'It is [SEG].<|end|>\n')
        )
        expected = policy.forward(
            {
                'input_ids': torch.tensor([whole]),
                'attention_mask': torch.ones(1, len(whole), dtype=torch.bool),
                'pixel_values': [batch['data']['pixel_values'][i]],
            },
            mode='tensor',
        )['seg_embeddings']
        torch.testing.assert_close(found[i : i + 1], expected, rtol=0, atol=2e-5)


def test_words_and_embeddings_may_stand_side_by_side(tiny_loop, batch):
    loop = build(tiny_loop)
    encoded = encode(loop, batch)
    table = loop.policy.language_model.get_input_embeddings().weight
    spliced = table[torch.tensor(encode_prompt(loop.policy.tokenizer, 'a circle'))]
    mixed, _ = loop.segment_descriptions(encoded, ['a red square', spliced], [0, 2], ['a', 'b'])
    first, _ = loop.segment_descriptions(encoded, ['a red square'], [0], ['a'])
    second, _ = loop.segment_descriptions(encoded, [spliced], [2], ['b'])
    torch.testing.assert_close(mixed, torch.cat([first, second]), rtol=0, atol=2e-4)


def test_the_mask_loss_says_whether_to_end_earlier(tiny_loop, batch):
    """The gradient of the ends' logits flows through the length alone: no end is ever picked."""
    found = {}
    for learn in (True, False):
        loop = build(tiny_loop, learn_length=learn, beta=0.0)
        encoded = encode(loop, batch)
        logits = []
        make = loop.objective.caption_logits

        def keep(*args, make=make, logits=logits):
            logits.append(make(*args))
            logits[-1].retain_grad()
            return logits[-1]

        loop.objective.caption_logits = keep
        found_losses, _ = loop.objective(loop, encoded)
        found_losses['loop1/mask_loss'].backward()
        ends = loop.objective._ends
        found[learn] = float(logits[0].grad[:, ends].abs().max())
    assert found[True] > 0
    assert found[False] == 0


def test_the_kl_is_to_the_teacher_and_zero_at_the_start(tiny_loop, batch):
    loop = build(tiny_loop, loop=dict(caption_to_mask=dict(weight=0)), beta=0.5)
    encoded = encode(loop, batch)
    losses, _metrics = loop.objective(loop, encoded)
    assert float(losses['loop1/kl_loss']) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in loop.policy.named_parameters():
            if 'lora_B' in name:
                parameter.normal_(std=0.02)
    rows, given = [0, 2], [[30, 31, 32], [50]]
    policy = loop.objective.caption_logits(loop, encoded, rows, given).softmax(-1)
    with loop.teacher_applied():
        teacher = loop.objective.caption_logits(loop, encoded, rows, given).softmax(-1)
    expected = (policy * (policy / teacher).log()).sum(-1).mean()
    loop.objective.mask_ratio = 0.0
    _, kl, _ = loop.objective.caption_embeds(loop, encoded, [[30, 31, 32], [], [50]])
    assert float(kl) == pytest.approx(float(expected), rel=1e-4)
    assert float(kl) > 0


def test_no_marker_is_ever_drawn_or_picked(tiny_loop, batch):
    loop = build(tiny_loop, mask_ratio=1.0)
    tokenizer = loop.policy.tokenizer
    markers = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    assert markers
    assert not markers & set(loop.objective._ordinary.tolist())
    encoded = encode(loop, batch)
    # A head that wants nothing but [SEG].
    seg = loop.policy.seg_token_id
    head = loop.policy.lm_head
    bias = torch.zeros(head.weight.shape[0])
    bias[seg] = 1e4
    handle = head.register_forward_hook(lambda _, __, out: out + bias)
    try:
        ids = loop.objective.caption_embeds(loop, encoded, [[30, 31], [40], [50]])[0].token_ids
    finally:
        handle.remove()
    assert not {token for row in ids for token in row} & markers


def test_empty_captions_give_a_mask_loss_with_an_empty_description(tiny_loop, batch, monkeypatch):
    loop = build(tiny_loop, loop=dict(caption_to_mask=dict(weight=0)))
    monkeypatch.setattr(loop, 'write_captions', lambda *_, **__: ['', 'a red cross', ''])
    losses, metrics = loop.objective(loop, encode(loop, batch))
    assert metrics['loop1/empty_captions'] == 2
    assert all(torch.isfinite(value) for value in losses.values())
    monkeypatch.setattr(loop, 'write_captions', lambda *_, **__: ['', '', ''])
    encoded = encode(loop, batch)
    torch.manual_seed(0)
    losses, metrics = loop.objective(loop, encoded)
    assert metrics['loop1/empty_captions'] == 3
    low_res, _ = loop.segment_descriptions(
        encoded, [torch.zeros(0, 128)] * 3, encoded.target_image, encoded.names
    )
    torch.manual_seed(0)
    expected, _ = mask_loss(low_res, encoded.target_masks)
    assert float(losses['loop1/mask_loss']) == pytest.approx(float(expected), rel=0.02)
    sum(losses.values()).backward()


def test_the_weight_of_the_return_trip_spares_the_way_through_the_caption(tiny_loop, batch):
    found = {}
    for weight in (1.0, 0.25):
        loop = build(
            tiny_loop,
            loop=dict(caption_to_mask=dict(weight=0)),
            return_weight=weight,
            answer_weight=0.0,
        )
        encoded = encode(loop, batch)
        kept = []
        make = loop.objective.caption_embeds

        def keep(*args, make=make, kept=kept):
            result = make(*args)
            for rows in (*result[0].embeds, *result[0].weights):
                rows.retain_grad()
                kept.append(rows)
            return result

        loop.objective.caption_embeds = keep
        loop.zero_grad()
        torch.manual_seed(0)
        losses, _ = loop.objective(loop, encoded)
        losses['loop1/mask_loss'].backward()
        head = loop.policy.text_hidden_fcs[2].weight.grad.clone()
        lora = [p.grad for n, p in loop.policy.named_parameters() if 'lora_B' in n]
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


def test_the_second_direction_teaches_the_mask_decoder_through_the_region(tiny_loop, batch):
    loop = build(tiny_loop, loop=dict(mask_to_caption=dict(weight=0)))
    encoded = encode(loop, batch)
    losses, metrics = loop.objective(loop, encoded)
    assert set(losses) == {'loop2/caption_loss'}
    assert metrics['loop2/empty_masks'] == 0
    losses['loop2/caption_loss'].backward()
    found = gradients(loop, ('mlp1', 'lora_', 'text_hidden_fcs', 'sam_mask_decoder'))
    assert all(value > 0 for value in found.values()), found


def test_the_straight_through_factor_is_one_going_forward(tiny_loop, batch, monkeypatch):
    loop = build(tiny_loop, loop=dict(mask_to_caption=dict(weight=0)))
    encoded = encode(loop, batch)
    seen = {}
    original = loop.caption_loss

    def spy(batch, samples, grids, factors, **options):
        seen.update(samples=samples, factors=factors)
        value = original(batch, samples, grids, factors, **options)
        seen['plain'] = original(batch, samples, grids)
        return value

    monkeypatch.setattr(loop, 'caption_loss', spy)
    losses, _ = loop.objective(loop, encoded)
    assert seen['samples'] == [0, 1]  # the third has no caption
    assert all(torch.equal(f, torch.ones_like(f)) for f in seen['factors'])
    assert float(losses['loop2/caption_loss']) == pytest.approx(float(seen['plain']), abs=1e-6)


def test_masks_that_come_out_empty_are_counted(tiny_loop, batch, monkeypatch):
    loop = build(tiny_loop, loop=dict(mask_to_caption=dict(weight=0)))
    encoded = encode(loop, batch)
    segment = loop.segment_descriptions

    def nothing(*args, **kwargs):
        low_res, loss = segment(*args, **kwargs)
        return low_res * 0 - 5, loss

    monkeypatch.setattr(loop, 'segment_descriptions', nothing)
    losses, metrics = loop.objective(loop, encoded)
    assert metrics['loop2/empty_masks'] == 2
    assert float(losses['loop2/caption_loss']) == 0
    losses['loop2/caption_loss'].backward()


def test_gradient_surgery_leads_with_the_first_direction(tiny_loop, batch, monkeypatch):
    loop = build(tiny_loop, gradient_surgery=True)
    policy = loop.policy
    weight = policy.text_hidden_fcs[2].bias
    direction = torch.zeros_like(weight)
    direction[0], direction[1] = 1.0, 1.0
    other = torch.zeros_like(weight)
    other[0] = -3.0

    def objective(loop, batch):
        # Gradients (1, 1) and (-3, 0): their product is -3, so the second becomes (-1.5, 1.5).
        losses = {
            'loop1/x_loss': (weight * direction).sum(),
            'loop2/y_loss': (weight * other).sum(),
        }
        return losses, {}

    objective.gradient_surgery = True
    monkeypatch.setattr(loop, 'objective', objective)
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in loop.parameters() if p.requires_grad], lr=1.0)
    loop.train_step(copy.deepcopy(batch), OptimWrapper(optimizer))
    step = before - weight.detach()
    torch.testing.assert_close(step[:3], torch.tensor([-0.5, 2.5, 0.0]))
    hub = MessageHub.get_current_instance()
    cosine = hub.get_scalar('train/gradient_cosine').current()
    assert cosine == pytest.approx(-3 / (2**0.5 * 3), abs=1e-5)


def test_the_temperature_follows_the_runners_iteration(tiny_loop):
    objective = GumbelObjective(tau=dict(start=2.0, end=0.5, steps=100), top_k=8)
    hub = MessageHub.get_current_instance()
    try:
        for iteration, expected in ((0, 2.0), (50, 1.0), (100, 0.5), (5000, 0.5)):
            hub.update_info('iter', iteration)
            assert objective.tau_now() == pytest.approx(expected)
    finally:
        hub.runtime_info.pop('iter')
    assert GumbelObjective(tau=0.7).tau_now() == 0.7


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(tau=0), 'tau must be positive'),
        (dict(tau=dict(start=1.0, end=-1.0, steps=3)), 'tau must be positive'),
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


def test_more_candidates_than_words_is_an_error_of_the_config(tiny_loop):
    with pytest.raises(ValueError, match=r'top_k=1024 exceeds the \d+ ordinary tokens'):
        build(tiny_loop, top_k=1024)
