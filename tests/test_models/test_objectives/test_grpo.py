"""GRPO in the wrapper: who acts, who scores, where gradients go, what is skipped."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from mmengine.optim import OptimWrapper

from projects.llava_sam2_rl.models import DualLoopModel, GRPOObjective
from projects.llava_sam2_rl.models.generation import no_gradient
from projects.llava_sam2_rl.models.segmentation import caption_seg_embeddings
from projects.llava_sam2_rl.models.shared_prefix import SharedPrefixForward
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.utils.modules import eval_mode
from test_models.batches import encode


class Fixed:
    """A reward that gives what it is told, and keeps what it was shown."""

    name = 'fixed'

    def __init__(self, values):
        self.values = values
        self.seen = []

    def __call__(self, rollouts):
        self.seen.append(rollouts)
        values = self.values(rollouts) if callable(self.values) else self.values
        return list(values)[: len(rollouts)]


def build(tiny_model, wrapper=None, **options) -> DualLoopModel:
    """``wrapper``: options of `DualLoopModel`; all others are the objective's."""
    options.setdefault('num_generations', 3)
    return DualLoopModel(
        tiny_model.policy, GRPOObjective(**options), max_new_tokens=6, **(wrapper or {})
    )


def gradients(model) -> dict[str, float]:
    """Largest gradient by trained part."""
    found = dict.fromkeys(('mlp1', 'lora_', 'text_hidden_fcs', 'sam_mask_decoder'), 0.0)
    for name, parameter in model.policy.named_parameters():
        for part in found:
            if part in name and parameter.grad is not None:
                found[part] = max(found[part], float(parameter.grad.abs().max()))
    return found


def backward(model, batch, only=None) -> dict:
    model.zero_grad()
    losses = model(**batch, mode='loss')
    total = sum(v for k, v in losses.items() if only is None or k == only)
    total.backward()
    return losses


def test_every_frozen_encoder_runs_once_with_both_directions_on(tiny_model, batch, monkeypatch):
    counted = {'vit': 0, 'sam': 0}
    vision = tiny_model.policy.vision_model
    sam = tiny_model.policy.grounding_encoder.sam2_model.image_encoder
    vit_forward, sam_forward = vision.forward, sam.forward

    def count_vit(pixel_values, *args, **kwargs):
        counted['vit'] += len(pixel_values)
        return vit_forward(pixel_values, *args, **kwargs)

    def count_sam(x):
        counted['sam'] += len(x)
        return sam_forward(x)

    monkeypatch.setattr(vision, 'forward', count_vit)
    monkeypatch.setattr(sam, 'forward', count_sam)
    losses = build(tiny_model, beta=0.1)(**batch, mode='loss')
    assert set(losses) == {'loop1/grpo_loss', 'loop2/grpo_loss', 'loop2/mask_loss'}
    assert counted == {'vit': 4, 'sam': 4}  # three first frames, one second frame


def test_what_the_rewards_are_shown(tiny_model, batch):
    captions, masks = Fixed([0.0, 0.5, 1.0] * 3), Fixed([0.0, 0.5, 1.0] * 2)
    model = build(
        tiny_model, mask_to_caption={'reward': captions}, caption_to_mask={'reward': masks}
    )
    model(**batch, mode='loss')
    first, second = captions.seen[0], masks.seen[0]
    names = [meta.name for meta in batch['data_samples']]
    assert first.direction == 'mask_to_caption'
    assert list(first.sample_ids) == [n for n in names for _ in range(3)]
    # The return trip of the second sample happens on its second frame.
    pair = batch['data']['pair']
    assert torch.equal(first.gt_masks[3], pair['masks'][0])
    assert torch.equal(first.gt_masks[0], batch['data']['masks'][0])
    assert second.direction == 'caption_to_mask'
    # The third sample has no caption: it takes part in the first direction only.
    assert list(second.sample_ids) == [n for n in names[:2] for _ in range(3)]
    assert torch.equal(second.gt_masks[3], batch['data']['masks'][1])
    # Explored: the G masks of one caption differ.
    assert not torch.equal(second.pred_mask_logits[0], second.pred_mask_logits[1])


def test_equal_rewards_teach_nothing_and_unequal_ones_do(tiny_model, batch):
    for value, learns in (([0.4] * 9, False), ([0.0, 0.5, 1.0] * 3, True)):
        model = build(
            tiny_model,
            beta=0.0,
            mask_to_caption={'reward': Fixed(value)},
            caption_to_mask={'reward': Fixed(value), 'aux_mask_weight': 0.0},
        )
        for key in ('loop1/grpo_loss', 'loop2/grpo_loss'):
            torch.manual_seed(0)
            backward(model, batch, only=key)
            found = gradients(model)
            assert (found['lora_'] > 0) is learns, key
            assert found['sam_mask_decoder'] == 0.0
            assert (found['text_hidden_fcs'] > 0) is (learns and key.startswith('loop2'))


def test_unscorable_completions_are_outside_the_group(tiny_model, batch):
    """With a group of None, 0, 1 the first completion gets no gradient: only it is None."""
    model = build(
        tiny_model,
        beta=0.0,
        mask_to_caption={'reward': Fixed([None, 0.0, 1.0] * 3)},
        wrapper={'caption_to_mask': {'weight': 0.0}},
    )
    rollout = model.rollout(encode(model, batch))['mask_to_caption']
    # mean 0.5, std sqrt(0.5): (0 - 0.5) / (0.70711 + 1e-4)
    expected = [0.0, -0.70701, 0.70701] * 3
    torch.testing.assert_close(rollout.advantages, torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_reward_raises_the_log_probability_of_what_it_likes(tiny_model, batch):
    """One step up the gradient makes the rewarded completions likelier, the others less so."""
    model = build(
        tiny_model,
        beta=0.0,
        mask_to_caption={'reward': Fixed([0.0, 0.0, 1.0] * 3)},
        wrapper={'caption_to_mask': {'weight': 0.0}},
    )
    encoded = encode(model, batch)
    # What a seed draws depends on torch's version: one is taken whose groups are of three texts.
    for seed in range(50):
        torch.manual_seed(seed)
        rollouts = model.rollout(encoded)
        drawn = rollouts['mask_to_caption'].completions
        texts = [drawn.texts[3 * i : 3 * i + 3] for i in range(3)]
        if all(len(set(group)) == 3 for group in texts):
            break
    else:
        pytest.fail('no draw of three different texts a group')
    losses, _ = model.objective.losses(model.policy, encoded, rollouts)
    losses['loop1/grpo_loss'].value.backward()

    def likelihood():
        with torch.no_grad(), eval_mode(model.policy):
            shared = SharedPrefixForward(model.policy, encoded)
            asked = shared.add_captions(drawn)
            shared.forward()
            logps, _ = shared.per_token_logps(asked, 1.0)
        return (logps * drawn.completion_mask).sum(1)

    before = likelihood()
    with torch.no_grad():
        for parameter in model.policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / (parameter.grad.norm() + 1e-9)
    change = (likelihood() - before).view(3, 3)
    # Than the others on the mean: one of them may begin with the same words.
    assert (change[:, 2] > change[:, :2].mean(dim=1)).all()


def test_the_noise_of_the_action_is_relative_to_its_scale(tiny_model, batch):
    model = build(tiny_model, caption_to_mask={'sigma': 0.25}, num_generations=64)
    torch.manual_seed(0)
    encoded = encode(model, batch)
    with eval_mode(model.policy), torch.no_grad():
        mean = caption_seg_embeddings(model.policy, encoded, [0, 1])
        drawn = model.objective.caption_to_mask.sample(model.policy, encoded)
    rms = mean.pow(2).mean(1).sqrt()
    noise = (drawn.actions - mean.repeat_interleave(64, dim=0)).view(2, -1).std(1)
    torch.testing.assert_close(noise, 0.25 * rms, rtol=0.05, atol=0)


def test_several_iterations_use_the_same_rollouts(tiny_model, batch, monkeypatch):
    model = build(tiny_model, num_iterations=3)
    calls = []
    rollout = GRPOObjective.rollout
    monkeypatch.setattr(GRPOObjective, 'rollout', lambda *args: calls.append(1) or rollout(*args))
    steps = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    model.train()
    model.train_step(batch, OptimWrapper(optimizer))
    assert len(calls) == 1
    assert len(steps) == 3
    for found in model.objective.last_rollouts.values():
        assert found.old_per_token_logps is not None


def test_one_iteration_is_on_policy(tiny_model, batch):
    model = build(tiny_model)
    for found in model.rollout(encode(model, batch)).values():
        assert found.old_per_token_logps is None


def ref_means(model):
    return model.objective.last_rollouts['caption_to_mask'].ref_action_mean


def test_the_initial_policy_as_reference_does_not_move(tiny_model, batch):
    model = build(tiny_model, beta=0.1, ref='initial', wrapper={'teacher': {'decay': 0.0}})
    torch.manual_seed(0)
    model(**batch, mode='loss')
    before = ref_means(model)
    with torch.no_grad():
        for parameter in model.policy.text_hidden_fcs.parameters():
            parameter.add_(0.1)
    model.update_teacher()  # decay 0: the teacher is the moved policy
    torch.manual_seed(0)
    model(**batch, mode='loss')
    torch.testing.assert_close(ref_means(model), before)
    model.objective.ref = 'teacher'
    model(**batch, mode='loss')
    assert not torch.allclose(ref_means(model), before)


def test_no_reference_pass_is_made_without_a_kl_term(tiny_model, batch, monkeypatch):
    model = build(tiny_model, beta=0.0, ref=None)
    judged = []
    original = model.objective._queue

    def watched(*args):
        judged.append(torch.is_grad_enabled())
        return original(*args)

    monkeypatch.setattr(model.objective, '_queue', watched)
    model(**batch, mode='loss')
    assert judged == [True]  # the policy's own pass
    assert model.objective.last_rollouts['mask_to_caption'].ref_per_token_logps is None
    assert ref_means(model) is None


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'beta': 0.1, 'ref': None}, 'needs a reference'),
        ({'num_generations': 1}, 'num_generations'),
        ({'num_iterations': 0}, 'num_iterations'),
        ({'ref': 'policy'}, "ref='policy' is unknown"),
        ({'temperature': 0.0}, 'temperature'),
        ({'caption_to_mask': {'sigma': 0.0}}, 'sigma must be positive'),
    ],
)
def test_bad_options_are_config_errors(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_model, **options)


def test_unknown_option_of_a_direction_names_the_nearest(tiny_model):
    with pytest.raises(TypeError, match="'sigmma': did you mean 'sigma'"):
        build(tiny_model, caption_to_mask={'sigmma': 1})


def test_what_is_asked_of_an_image_takes_one_pass(tiny_model, batch, monkeypatch):
    """Of the teacher one for return trip and references; of the policy one with gradient."""
    model = build(tiny_model)
    passes = []
    original = type(model.policy).hidden_states

    def counted(policy, embeds, *args, **kwargs):
        passes.append((model.teacher._applied, torch.is_grad_enabled()))
        return original(policy, embeds, *args, **kwargs)

    monkeypatch.setattr(type(model.policy), 'hidden_states', counted)
    model(**batch, mode='loss')
    # The policy's mean actions, from which actions are drawn, come before.
    assert passes == [(False, False), (True, False), (False, True)]


def test_activation_checkpointing_repeats_the_layers_without_dropout(tiny_config, batch):
    """The backward pass repeats the layers when the policy is in training mode again."""
    found, repeated = [], []
    for checkpointing in (False, True):
        config = copy.deepcopy(tiny_config.model)
        config.policy.update(gradient_checkpointing=checkpointing)
        config.policy.lora.lora_dropout = 0.5
        config.update(objective=GRPOObjective(num_generations=3), max_new_tokens=6)
        torch.manual_seed(0)
        model = MODELS.build(config).train()
        with torch.no_grad():
            for name, parameter in model.policy.named_parameters():
                if 'lora_B' in name:
                    parameter.normal_(std=0.05)
        layer = model.policy._decoder.layers[0]
        # Inside of the layer: hooks of the layer itself may stand outside of what is repeated.
        handle = layer.self_attn.register_forward_pre_hook(
            lambda *_, layer=layer: repeated.append((layer.training, layer.self_attn.training))
        )
        torch.manual_seed(1)
        losses = model(**batch, mode='loss')
        repeated.clear()
        sum(losses.values()).backward()
        assert repeated == ([(False, False)] if checkpointing else [])
        assert layer.training
        handle.remove()
        found.append({n: p.grad for n, p in model.policy.named_parameters() if p.requires_grad})
    assert any(g is not None and 'lora_A' in n and g.abs().max() > 0 for n, g in found[0].items())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_hooks_read_what_the_last_rollouts_were(tiny_model, batch):
    """Texts, rewards and advantages side by side, of the directions that had something to do."""
    model = build(tiny_model)
    assert model.objective.last_rollouts == {}
    rollouts = model.rollout(encode(model, batch))
    assert rollouts is model.objective.last_rollouts
    assert set(rollouts) == {'mask_to_caption', 'caption_to_mask'}
    for direction, samples in (('mask_to_caption', 3), ('caption_to_mask', 2)):
        found = rollouts[direction]
        count = 3 * samples
        assert list(found.samples) == list(range(samples))
        assert len(found.captions) == len(found.reward_inputs) == count
        assert found.rewards.rewards.shape == found.advantages.shape == (count,)
        # A group's advantages add up to nothing.
        torch.testing.assert_close(
            found.advantages.view(-1, 3).sum(1), torch.zeros(samples), atol=1e-4, rtol=0
        )
    # On a batch without captions the second direction has nothing to do.
    plain = {**batch, 'data': {**batch['data'], 'captions': [None] * 3}}
    model.rollout(encode(model, plain))
    assert set(model.objective.last_rollouts) == {'mask_to_caption'}


def test_rewards_normalised_apart_are_divided_by_their_spread_on_all_ranks(
    tiny_model, batch, monkeypatch
):
    """What ranks exchange is the spread of the sums of normalised rewards, not of the rewards."""
    wanted = {
        'type': 'WeightedRewards',
        'rewards': [
            {'type': Fixed, 'values': [0.0, 1.0, 2.0] * 3, 'name': 'a'},
            {'type': Fixed, 'values': [2.0, 0.0, 1.0] * 3, 'name': 'b', 'weight': 2},
        ],
    }
    model = build(
        tiny_model,
        multi_objective_aggregation='normalize_then_sum',
        mask_to_caption={'reward': wanted},
        wrapper={'caption_to_mask': {'weight': 0.0}},
    )
    monkeypatch.setattr('projects.llava_sam2_rl.models.objectives.grpo.is_shared', lambda: True)
    found = model.rollout(encode(model, batch))['mask_to_caption']
    # -1 0 1 and twice 1 -1 0, over 1.0001: 1 -2 1 three times, of nine values.
    spread = (3 * 6 / 8) ** 0.5 / 1.0001
    assert found.reward_std.item() == pytest.approx(spread)
    expected = [x / 1.0001 / (spread + 1e-4) for x in (1, -2, 1)] * 3
    assert found.advantages.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('surrogate', ['cispo', 'sapo'])
def test_the_newer_options_train_over_several_updates(tiny_model, batch, surrogate):
    model = build(
        tiny_model,
        surrogate=surrogate,
        top_entropy_quantile=0.5,
        num_iterations=2,
        mask_to_caption={'reward': Fixed([0.0, 0.5, 1.0] * 3)},
        caption_to_mask={'reward': Fixed([0.0, 0.5, 1.0] * 2)},
    )
    before = [p.detach().clone() for p in model.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = model.train().train_step(batch, OptimWrapper(optimizer))
    assert all(math.isfinite(float(value)) for value in losses.values())
    after = [p for p in model.policy.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_teachers_part_of_a_batch_equals_that_of_one_by_one(tiny_model, batch):
    """Same completions and actions: masks of the return trip, references and captions."""
    model = build(tiny_model)
    encoded = encode(model, batch)
    objective, policy, teacher = model.objective, model.policy, model.teacher
    torch.manual_seed(0)
    with no_gradient(), eval_mode(policy):
        captions = objective.mask_to_caption.sample(policy, encoded, objective.sampling)
        actions = objective.caption_to_mask.sample(policy, encoded)
        masks = objective.caption_to_mask.masks(policy, encoded, actions)
        together = objective._teacher_pass(policy, teacher, encoded, captions, masks)
        texts = objective.caption_to_mask.described(policy, teacher, encoded, masks, 6).captions
        for i in range(3):
            rows = slice(3 * i, 3 * i + 3)
            alone = encoded.subset([i])
            mine = cut(captions, rows)
            again = None
            if i < 2:
                drawn = type(actions)(*(x[rows] for x in vars(actions).values()))
                again = objective.caption_to_mask.masks(policy, alone, drawn)
            found = objective._teacher_pass(policy, teacher, alone, mine, again)
            close = dict(atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(found.low_res, together.low_res[rows], **close)
            torch.testing.assert_close(
                found.ref_per_token_logps, together.ref_per_token_logps[rows], **close
            )
            if again is not None:
                torch.testing.assert_close(
                    found.ref_action_mean, together.ref_action_mean[i : i + 1], **close
                )
                again = objective.caption_to_mask.described(policy, teacher, alone, again, 6)
                assert again.captions == texts[rows]
                for a, b in zip(again.logits, masks.logits[rows], strict=True):
                    torch.testing.assert_close(a, b, **close)


def cut(completions, rows):
    fields = {
        name: value[rows]
        for name, value in vars(completions).items()
        if isinstance(value, list | torch.Tensor)
    }
    return dataclasses.replace(completions, **fields)
