"""The wrapper: what a step does in which order, what is weighted, skipped, trained and saved."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.optim import OptimWrapper

from projects.llava_sam2_rl.models import (
    DualLoopModel,
    GRPOObjective,
    GumbelObjective,
    SFTObjective,
)
from projects.llava_sam2_rl.models import captioning as captioning_module
from projects.llava_sam2_rl.models.captioning import conversation_loss
from projects.llava_sam2_rl.models.objectives import grpo_mask_to_caption, gumbel, sft
from projects.llava_sam2_rl.structures import MeanLoss
from test_models.batches import encode, randomize_lora

#: Where each objective looks up what samples or writes.
SAMPLERS = (
    (captioning_module, 'sample_completions'),
    (grpo_mask_to_caption, 'sample_captions'),
    (sft, 'write_captions'),
    (gumbel, 'write_captions'),
)


def sgd(model: DualLoopModel, lr: float = 1e-3) -> OptimWrapper:
    return OptimWrapper(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr))


def test_the_runners_init_weights_leaves_the_pretrained_model_as_it_is(tiny_model):
    before = {key: value.clone() for key, value in tiny_model.policy.state_dict().items()}
    tiny_model.init_weights()
    tiny_model.policy.init_weights()
    after = tiny_model.policy.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    # peft starts LoRA as no change at all.
    zeros = [value for key, value in after.items() if '.lora_B.' in key]
    assert zeros
    assert not any(value.any() for value in zeros)


def test_every_frozen_encoder_runs_once_per_image_per_step(tiny_model, batch, monkeypatch):
    images = {'vit': 0, 'sam': 0}
    policy = tiny_model.policy
    sam = policy.grounding_encoder.sam2_model.image_encoder
    vit_forward, sam_forward = policy.vision_model.forward, sam.forward

    def count_vit(pixel_values, *args, **kwargs):
        images['vit'] += len(pixel_values)
        return vit_forward(pixel_values, *args, **kwargs)

    def count_sam(x):
        images['sam'] += len(x)
        return sam_forward(x)

    monkeypatch.setattr(policy.vision_model, 'forward', count_vit)
    monkeypatch.setattr(sam, 'forward', count_sam)
    tiny_model.train()
    losses = tiny_model(**batch, mode='loss')
    assert {'loop1/mask_loss', 'loop1/caption_loss', 'loop2/mask_loss'} <= set(losses)
    # Four first frames and two second frames, both directions, teacher and policy.
    assert images == {'vit': 6, 'sam': 6}


# -- the order of a step -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('objective', 'iterations'),
    [
        (lambda: SFTObjective(), 1),
        (lambda: GumbelObjective(), 1),
        (lambda: GRPOObjective(num_generations=2), 1),
        (lambda: GRPOObjective(num_iterations=3, num_generations=2), 3),
    ],
    ids=['sft', 'gumbel', 'grpo', 'grpo_3'],
)
def test_rollouts_come_before_the_wrapped_forward(
    tiny_model, batch, monkeypatch, objective, iterations
):
    """Sampled once, without gradient, outside of what DDP wraps; every update gets the same."""
    model = DualLoopModel(tiny_model.policy, objective(), max_new_tokens=4)
    assert model.objective.num_iterations == iterations
    events: list[tuple[str, bool]] = []

    for module, name in SAMPLERS:
        original = getattr(module, name)

        def watched(*args, _original=original, _name=name, **options):
            events.append((_name, torch.is_grad_enabled()))
            return _original(*args, **options)

        monkeypatch.setattr(module, name, watched)

    given = []

    class Wrapper:
        def __call__(self, batch, rollouts, mode):
            assert mode == 'objective'
            assert torch.is_grad_enabled()
            given.append((batch, rollouts))
            events.append(('enter', True))
            found = model(batch, rollouts, mode=mode)
            events.append(('leave', True))
            return found

    model.train()
    model.train_step(batch, sgd(model), wrapper=Wrapper())
    names = [name for name, _ in events]
    first = names.index('enter')
    assert set(names[:first]) & {'sample_completions', 'sample_captions', 'write_captions'}
    assert names[first:] == ['enter', 'leave'] * iterations
    assert not any(grad for _, grad in events[:first])
    assert all(pair[0] is given[0][0] and pair[1] is given[0][1] for pair in given)
    for rollout in given[0][1].values():
        for name, value in vars(rollout).items():
            if isinstance(value, torch.Tensor):
                assert not value.requires_grad, name
                # An inference tensor could not take part in the losses.
                assert not value.is_inference(), name


def test_forward_alone_gives_the_losses_of_a_step(tiny_model, batch):
    tiny_model.eval()
    torch.manual_seed(1)
    losses = tiny_model(**batch, mode='loss')
    torch.manual_seed(1)
    log = tiny_model.train_step(copy.deepcopy(batch), sgd(tiny_model))
    # One rank: a step's log is what `loss` mode returns, and its sum.
    assert log.pop('loss') == pytest.approx(sum(x.item() for x in losses.values()), rel=1e-5)
    assert log.keys() == losses.keys()
    for key, value in losses.items():
        assert log[key] == pytest.approx(value.item(), rel=1e-4), key


def test_an_unknown_mode_is_refused(tiny_model, batch):
    with pytest.raises(ValueError, match="mode must be 'loss', 'objective' or 'predict'"):
        tiny_model(**batch, mode='tensor')


# -- gradients -----------------------------------------------------------------------------------


def test_gradients_reach_every_trained_part_and_nothing_else(tiny_model, batch):
    shadows = {k: v.clone() for k, v in tiny_model.teacher.state_dict()['shadows'].items()}
    tiny_model.train()
    losses = tiny_model(**batch, mode='loss')
    sum(value for key, value in losses.items() if 'loss' in key).backward()
    for name, parameter in tiny_model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
    for part in ('mlp1', 'text_hidden_fcs', 'lora_B', 'sam_mask_decoder.conv_s0'):
        gradients = [p.grad for n, p in tiny_model.named_parameters() if part in n]
        assert any(g is not None and g.abs().max() > 0 for g in gradients), part
    after = tiny_model.teacher.state_dict()['shadows']
    assert all(torch.equal(after[k], shadows[k]) for k in shadows)


def test_steps_that_are_not_finite_are_skipped_and_bounded(tiny_model, batch):
    model = DualLoopModel(
        tiny_model.policy,
        GRPOObjective(num_generations=3, beta=0.0),
        mask_to_caption={'weight': 0.0},
        max_new_tokens=6,
        max_skipped_steps=1,
    )
    wrapper = sgd(model, lr=0.1)
    with torch.no_grad():
        model.policy.text_hidden_fcs[0].bias[0] = float('nan')
    before = copy.deepcopy(model.state_dict())
    model.train_step(batch, wrapper)
    assert model.skipped_steps == 1
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) or 'text_hidden_fcs.0.bias' in k for k in after)
    with pytest.raises(RuntimeError, match=r'2 steps had a loss.*loop2.*max_skipped_steps is 1'):
        model.train_step(batch, wrapper)


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize('off', ['mask_to_caption', 'caption_to_mask'])
@pytest.mark.parametrize('objective', [SFTObjective, GumbelObjective, GRPOObjective])
def test_a_direction_of_weight_zero_is_off(tiny_model, batch, off, objective):
    model = DualLoopModel(
        tiny_model.policy, objective(), max_new_tokens=4, **{off: {'weight': 0.0}}
    )
    assert model.objective.directions == {'mask_to_caption', 'caption_to_mask'} - {off}
    losses = model(**batch, mode='loss')
    left = 'loop2' if off == 'mask_to_caption' else 'loop1'
    assert {key.split('/')[0] for key in losses} == {left}
    assert off not in model.rollout(encode(model, batch))


def test_the_weight_of_a_direction_scales_its_losses(tiny_model, batch):
    tiny_model.eval()
    torch.manual_seed(1)
    once = tiny_model(**batch, mode='loss')
    tiny_model.weights['caption_to_mask'] = 3.0
    torch.manual_seed(1)
    thrice = tiny_model(**batch, mode='loss')
    for key in ('loop2/mask_loss', 'loop2/answer_loss'):
        torch.testing.assert_close(thrice[key], 3 * once[key])
    assert torch.equal(thrice['loop1/mask_loss'], once['loop1/mask_loss'])


def test_a_loss_of_no_direction_keeps_its_value(tiny_model, batch, monkeypatch):
    loss = MeanLoss(torch.tensor(2.0), 3)
    found = {'loop1/a': loss, 'loop2/a': loss, 'other/a': loss}
    monkeypatch.setattr(tiny_model.objective, 'losses', lambda *_: (found, {}))
    tiny_model.weights.update(mask_to_caption=3.0, caption_to_mask=0.5)
    losses, _ = tiny_model.losses(encode(tiny_model, batch), {})
    assert {key: (float(x.value), x.count) for key, x in losses.items()} == {
        'loop1/a': (6.0, 3),
        'loop2/a': (1.0, 3),
        'other/a': (2.0, 3),
    }


# -- checkpoints ---------------------------------------------------------------------------------


def test_checkpoints_hold_trainable_tensors_only_and_load_back(tiny_model):
    state = tiny_model.state_dict()
    assert set(state) == {n for n, p in tiny_model.named_parameters() if p.requires_grad}
    assert {key.split('.')[0] for key in state} == {'policy'}
    other = copy.deepcopy(tiny_model)
    changed = {key: torch.randn_like(value) for key, value in state.items()}
    result = other.load_state_dict(changed, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(other.state_dict()[k], changed[k]) for k in changed)
    key = next(iter(changed))
    del changed[key]
    assert other.load_state_dict(changed, strict=False).missing_keys == [key]


def test_the_teacher_follows_the_policy_by_its_decay(tiny_model):
    with torch.no_grad():
        tiny_model.policy.mlp1[1].weight.add_(1.0)
    tiny_model.update_teacher()
    shadow = tiny_model.teacher.state_dict()['shadows']['mlp1.1.weight']
    moved = tiny_model.policy.mlp1[1].weight - shadow
    expected = torch.full_like(shadow, tiny_model.teacher.decay)
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)
    with tiny_model.teacher_applied():
        torch.testing.assert_close(tiny_model.policy.mlp1[1].weight, shadow)


# -- options -------------------------------------------------------------------------------------


def test_bad_options(tiny_model):
    policy = tiny_model.policy
    with pytest.raises(ValueError, match='both directions have weight 0'):
        DualLoopModel(
            policy, SFTObjective(), mask_to_caption={'weight': 0}, caption_to_mask={'weight': 0}
        )
    with pytest.raises(ValueError, match='must not be negative, got -1'):
        DualLoopModel(policy, SFTObjective(), mask_to_caption={'weight': -1})
    with pytest.raises(TypeError, match="mask_to_caption has no option 'wieght': did you mean"):
        DualLoopModel(policy, SFTObjective(), mask_to_caption={'wieght': 1})
    with pytest.raises(TypeError, match="no option 'max_new_token': did you mean 'max_new_tokens'"):
        DualLoopModel(policy, SFTObjective(), max_new_token=3)
    with pytest.raises(ValueError, match='predict_with'):
        DualLoopModel(policy, SFTObjective(), predict_with='student')
    with pytest.raises(KeyError, match="'SFTObjectiv' is not registered.*did you mean 'SFTObj"):
        DualLoopModel(policy, {'type': 'SFTObjectiv'})


# -- conversations -------------------------------------------------------------------------------


def test_conversations_ride_along_with_cross_entropy_alone(tiny_model, mixed):
    tiny_model.eval()
    encoded = encode(tiny_model, mixed)
    torch.manual_seed(0)
    losses, _ = tiny_model.losses(encoded, tiny_model.rollout(encoded))
    torch.manual_seed(0)
    regions = encoded.subset([0, 2])
    policy, objective = tiny_model.policy, tiny_model.objective
    rollouts = objective.rollout(policy, tiny_model.teacher, regions)
    alone, _ = objective.losses(policy, regions, rollouts)
    assert losses.pop('chat/caption_loss').value > 0
    assert losses.keys() == alone.keys()
    for key, loss in alone.items():
        torch.testing.assert_close(losses[key].value, loss.value)
        assert losses[key].count == loss.count


def test_a_batch_of_conversations_alone_trains_on_them(tiny_model, mixed):
    tiny_model.eval()
    encoded = encode(tiny_model, mixed).subset([1])
    rollouts = tiny_model.rollout(encoded)
    assert rollouts == {}
    losses, _ = tiny_model.losses(encoded, rollouts)
    assert set(losses) == {'chat/caption_loss'}
    tiny_model.chat_weight = 0.5
    half, _ = tiny_model.losses(encoded, {})
    full = conversation_loss(tiny_model.policy, encoded, [0])
    torch.testing.assert_close(half['chat/caption_loss'].value, 0.5 * full.value)
    assert half['chat/caption_loss'].count == full.count
    tiny_model.chat_weight = 0.0
    assert tiny_model.losses(encoded, {})[0] == {}


def test_the_rollout_runs_with_the_policys_weights_again_afterwards(tiny_model, batch):
    randomize_lora(tiny_model.policy, 0.02)
    before = {n: p.detach().clone() for n, p in tiny_model.policy.named_parameters()}
    tiny_model.rollout(encode(tiny_model, batch))
    assert all(torch.equal(p, before[n]) for n, p in tiny_model.policy.named_parameters())
