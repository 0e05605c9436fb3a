"""GRPO in the wrapper: who acts, who scores, where gradients go, what is skipped."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.optim import OptimWrapper

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.models import DualLoopModel, GRPOObjective
from projects.llava_sam2_rl.registry import TRANSFORMS


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


@pytest.fixture(scope='module')
def batch(tiny_config) -> dict:
    transform = TRANSFORMS.build(tiny_config.val_dataloader.dataset.transforms)
    plain = GeneratedScenes(length=8, split='val', transforms=transform)
    paired = GeneratedScenes(length=8, split='val', paired=True, transforms=transform)
    collated = sa2va_collate([plain[0], paired[0], plain[1]])
    collated['data']['captions'][2] = None
    return collated


def build(tiny_loop, **options) -> DualLoopModel:
    options.setdefault('num_generations', 3)
    loop_options = options.pop('loop', {})
    return DualLoopModel(
        tiny_loop.policy, GRPOObjective(**options), max_new_tokens=6, **loop_options
    )


def gradients(loop) -> dict[str, float]:
    """Largest gradient by trained part."""
    found = dict.fromkeys(('mlp1', 'lora_', 'text_hidden_fcs', 'sam_mask_decoder'), 0.0)
    for name, parameter in loop.policy.named_parameters():
        for part in found:
            if part in name and parameter.grad is not None:
                found[part] = max(found[part], float(parameter.grad.abs().max()))
    return found


def backward(loop, batch, only=None) -> dict:
    loop.zero_grad()
    losses = loop(**batch, mode='loss')
    total = sum(v for k, v in losses.items() if only is None or k == only)
    total.backward()
    return losses


def test_every_frozen_encoder_runs_once_with_both_directions_on(tiny_loop, batch, monkeypatch):
    counted = {'vit': 0, 'sam': 0}
    vision = tiny_loop.policy.vision_model
    sam = tiny_loop.policy.grounding_encoder.sam2_model.image_encoder
    vit_forward, sam_forward = vision.forward, sam.forward

    def count_vit(*args, **kwargs):
        counted['vit'] += len(kwargs['pixel_values'])
        return vit_forward(*args, **kwargs)

    def count_sam(x):
        counted['sam'] += len(x)
        return sam_forward(x)

    monkeypatch.setattr(vision, 'forward', count_vit)
    monkeypatch.setattr(sam, 'forward', count_sam)
    losses = build(tiny_loop, beta=0.1)(**batch, mode='loss')
    assert set(losses) == {'loop1/grpo_loss', 'loop2/grpo_loss', 'loop2/mask_loss'}
    assert counted == {'vit': 4, 'sam': 4}  # three first frames, one second frame


def test_what_the_rewards_are_shown(tiny_loop, batch):
    captions, masks = Fixed([0.0, 0.5, 1.0] * 3), Fixed([0.0, 0.5, 1.0] * 2)
    loop = build(tiny_loop, mask_to_caption={'reward': captions}, caption_to_mask={'reward': masks})
    loop(**batch, mode='loss')
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


def test_equal_rewards_teach_nothing_and_unequal_ones_do(tiny_loop, batch):
    for value, learns in (([0.4] * 9, False), ([0.0, 0.5, 1.0] * 3, True)):
        loop = build(
            tiny_loop,
            beta=0.0,
            mask_to_caption={'reward': Fixed(value)},
            caption_to_mask={'reward': Fixed(value), 'aux_mask_weight': 0.0},
        )
        for key in ('loop1/grpo_loss', 'loop2/grpo_loss'):
            torch.manual_seed(0)
            backward(loop, batch, only=key)
            found = gradients(loop)
            assert (found['lora_'] > 0) is learns, key
            assert found['sam_mask_decoder'] == 0.0
            assert (found['text_hidden_fcs'] > 0) is (learns and key.startswith('loop2'))


def test_unscorable_completions_are_outside_the_group(tiny_loop, batch):
    """With a group of None, 0, 1 the first completion gets no gradient: only it is None."""
    loop = build(
        tiny_loop,
        beta=0.0,
        mask_to_caption={'reward': Fixed([None, 0.0, 1.0] * 3)},
        loop={'caption_to_mask': {'weight': 0.0}},
    )
    loop.objective.roll_out(loop, loop.encode(batch['data'], ['a', 'b', 'c']))
    rewards = loop.objective.last['loop1'].rewards.rewards
    advantages = loop.objective.caption_head.advantages(rewards)
    # mean 0.5, std sqrt(0.5): (0 - 0.5) / (0.70711 + 1e-4)
    expected = [0.0, -0.70701, 0.70701] * 3
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_reward_raises_the_log_probability_of_what_it_likes(tiny_loop, batch):
    """One step up the gradient makes the rewarded completions likelier, the others less so."""
    from projects.llava_sam2_rl.models.shared_prefix import Reading

    loop = build(
        tiny_loop,
        beta=0.0,
        mask_to_caption={'reward': Fixed([0.0, 0.0, 1.0] * 3)},
        loop={'caption_to_mask': {'weight': 0.0}},
    )
    torch.manual_seed(0)
    encoded = loop.encode(batch['data'], ['a', 'b', 'c'])
    rollouts = loop.objective.roll_out(loop, encoded)
    losses, _ = loop.objective.losses(loop, encoded, rollouts)
    losses['loop1/grpo_loss'].backward()
    drawn = rollouts['loop1'].completions

    def likelihood():
        with torch.no_grad(), loop.eval_mode():
            reading = Reading(loop, encoded)
            prompts = reading.add_regions()
            nodes = reading.add_completions(prompts, drawn)
            reading.run()
            logps, _ = reading.logps(prompts, nodes, drawn, 1.0)
        return (logps * drawn.completion_mask).sum(1)

    before = likelihood()
    with torch.no_grad():
        for parameter in loop.policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / (parameter.grad.norm() + 1e-9)
    change = (likelihood() - before).view(3, 3)
    texts = [drawn.texts[3 * i : 3 * i + 3] for i in range(3)]
    assert all(len(set(group)) == 3 for group in texts), 'the draw has to differ for this test'
    assert (change[:, 2] > change[:, :2].max(dim=1).values).all()


def test_the_noise_of_the_action_is_relative_to_its_scale(tiny_loop, batch):
    loop = build(tiny_loop, caption_to_mask={'sigma': 0.25}, num_generations=64)
    torch.manual_seed(0)
    encoded = loop.encode(batch['data'], ['a', 'b', 'c'])
    with loop.eval_mode(), torch.no_grad():
        mean = loop.objective._mean_actions(loop, encoded, [0, 1])
        drawn = loop.objective._sample_actions(loop, encoded, [0, 1])
    rms = mean.pow(2).mean(1).sqrt()
    noise = (drawn.actions - mean.repeat_interleave(64, dim=0)).view(2, -1).std(1)
    torch.testing.assert_close(noise, 0.25 * rms, rtol=0.05, atol=0)


def test_several_iterations_use_the_same_rollouts(tiny_loop, batch, monkeypatch):
    loop = build(tiny_loop, num_iterations=3)
    calls = []
    roll_out = GRPOObjective.roll_out
    monkeypatch.setattr(GRPOObjective, 'roll_out', lambda *args: calls.append(1) or roll_out(*args))
    steps = []
    parameters = [p for p in loop.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    loop.train()
    loop.train_step(batch, OptimWrapper(optimizer))
    assert len(calls) == 1
    assert len(steps) == 3
    assert loop.objective.last['loop1'].old_logps is not None


def test_the_initial_policy_as_reference_does_not_move(tiny_loop, batch):
    loop = build(tiny_loop, beta=0.1, ref='initial', loop={'teacher': {'decay': 0.0}})
    torch.manual_seed(0)
    loop(**batch, mode='loss')
    before = loop.objective.last['loop2'].reference
    with torch.no_grad():
        for parameter in loop.policy.text_hidden_fcs.parameters():
            parameter.add_(0.1)
    loop.update_teacher()  # decay 0: the teacher is the moved policy
    torch.manual_seed(0)
    loop(**batch, mode='loss')
    torch.testing.assert_close(loop.objective.last['loop2'].reference, before)
    loop.objective.ref = 'teacher'
    loop(**batch, mode='loss')
    assert not torch.allclose(loop.objective.last['loop2'].reference, before)


def test_no_reference_pass_is_made_without_a_kl_term(tiny_loop, batch, monkeypatch):
    loop = build(tiny_loop, beta=0.0, ref=None)
    judged = []
    original = loop.objective._add

    def watched(*args):
        judged.append(torch.is_grad_enabled())
        return original(*args)

    monkeypatch.setattr(loop.objective, '_add', watched)
    loop(**batch, mode='loss')
    assert judged == [True]  # the policy's own pass
    assert loop.objective.last['loop1'].reference is None
    assert loop.objective.last['loop2'].reference is None


def test_steps_that_are_not_finite_are_skipped_and_bounded(tiny_loop, batch):
    loop = build(
        tiny_loop,
        beta=0.0,
        mask_to_caption={'reward': Fixed([0.0, 0.5, 1.0] * 3)},
        loop={'max_skipped_steps': 1, 'mask_to_caption': {'weight': 0.0}},
    )
    optimizer = torch.optim.SGD([p for p in loop.parameters() if p.requires_grad], lr=0.1)
    with torch.no_grad():
        loop.policy.text_hidden_fcs[0].bias[0] = float('nan')
    before = copy.deepcopy(loop.state_dict())
    loop.train_step(batch, OptimWrapper(optimizer))
    assert loop.skipped_steps == 1
    after = loop.state_dict()
    assert all(torch.equal(after[k], before[k]) or 'text_hidden_fcs.0.bias' in k for k in after)
    with pytest.raises(RuntimeError, match=r'2 steps had a loss.*loop2.*max_skipped_steps is 1'):
        loop.train_step(batch, OptimWrapper(optimizer))


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
def test_bad_options_are_config_errors(tiny_loop, options, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_loop, **options)


def test_unknown_option_of_a_direction_names_the_nearest(tiny_loop):
    with pytest.raises(TypeError, match="'sigmma': did you mean 'sigma'"):
        build(tiny_loop, caption_to_mask={'sigmma': 1})


def test_what_is_asked_of_an_image_takes_one_pass(tiny_loop, batch, monkeypatch):
    """Of the teacher one for return trip and references; of the policy one with gradient."""
    loop = build(tiny_loop)
    passes = []
    original = type(loop.policy).hidden_states

    def counted(policy, embeds, *args, **kwargs):
        passes.append((loop.teacher._applied, torch.is_grad_enabled()))
        return original(policy, embeds, *args, **kwargs)

    monkeypatch.setattr(type(loop.policy), 'hidden_states', counted)
    loop(**batch, mode='loss')
    # The policy's mean actions, from which actions are drawn, come before.
    assert passes == [(False, False), (True, False), (False, True)]


def test_activation_checkpointing_repeats_the_layers_without_dropout(tiny_config, batch):
    """The backward pass repeats the layers when the policy is in training mode again."""
    from projects.llava_sam2_rl.registry import MODELS

    found, repeated = [], []
    for checkpointing in (False, True):
        config = copy.deepcopy(tiny_config.model)
        config.policy.update(gradient_checkpointing=checkpointing)
        config.policy.lora.lora_dropout = 0.5
        config.update(objective=GRPOObjective(num_generations=3), max_new_tokens=6)
        torch.manual_seed(0)
        loop = MODELS.build(config).train()
        with torch.no_grad():
            for name, parameter in loop.policy.named_parameters():
                if 'lora_B' in name:
                    parameter.normal_(std=0.05)
        layer = loop.policy._decoder.layers[0]
        handle = layer.register_forward_pre_hook(
            lambda *_, layer=layer: repeated.append((layer.training, layer.self_attn.training))
        )
        torch.manual_seed(1)
        losses = loop(**batch, mode='loss')
        repeated.clear()
        sum(losses.values()).backward()
        assert repeated == ([(False, False)] if checkpointing else [])
        assert layer.training
        handle.remove()
        found.append({n: p.grad for n, p in loop.policy.named_parameters() if p.requires_grad})
    assert any(g is not None and 'lora_A' in n and g.abs().max() > 0 for n, g in found[0].items())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_a_checkpointed_graph_is_walked_twice(tiny_config):
    """Gradient surgery takes each direction's gradient from one retained graph."""
    from projects.llava_sam2_rl.registry import MODELS

    config = copy.deepcopy(tiny_config.model.policy)
    config.update(gradient_checkpointing=True)
    policy = MODELS.build(config)
    embeds = torch.randn(1, 5, 128, requires_grad=True)
    mask = torch.ones(1, 5, dtype=torch.bool)
    policy.eval()
    total = policy.hidden_states(embeds, mask).square().sum()
    policy.train()
    first, second = (torch.autograd.grad(total, embeds, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.abs().max() > 0
    assert policy._decoder.layers.training
