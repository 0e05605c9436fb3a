"""Two directions that pull apart: the first leads, and the optimizer sees what is left."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper

from projects.llava_sam2_rl.models import DualLoopModel, Objective
from projects.llava_sam2_rl.models.gradient_surgery import apply_gradient_surgery
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.structures import MeanLoss


class Conflicting(Objective):
    """Gradients (1, 1) and (-3, 0) of a bias: their product is -3."""

    gradient_surgery = True

    def rollout(self, policy, teacher, batch):
        return {}

    def losses(self, policy, batch, rollouts):
        bias = policy.text_hidden_fcs[2].bias
        first, second = torch.zeros_like(bias), torch.zeros_like(bias)
        first[:2], second[0] = 1.0, -3.0
        return {
            'loop1/x_loss': MeanLoss((bias * first).sum()),
            'loop2/y_loss': MeanLoss((bias * second).sum()),
        }, {}


def test_gradient_surgery_leads_with_the_first_direction(tiny_model, batch):
    model = DualLoopModel(tiny_model.policy, Conflicting())
    weight = model.policy.text_hidden_fcs[2].bias
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train_step(copy.deepcopy(batch), OptimWrapper(optimizer))
    step = before - weight.detach()
    # The second becomes (-1.5, 1.5).
    torch.testing.assert_close(step[:3], torch.tensor([-0.5, 2.5, 0.0]))
    hub = MessageHub.get_current_instance()
    cosine = hub.get_scalar('train/gradient_cosine').current()
    assert cosine == pytest.approx(-3 / (2**0.5 * 3), abs=1e-5)


def test_the_loss_keeps_its_value_and_its_scaling():
    weight = torch.nn.Parameter(torch.tensor([2.0, 5.0]))
    losses = {'loop1/a': (weight * torch.tensor([1.0, 1.0])).sum(), 'loop2/b': -3 * weight[0]}
    total = sum(losses.values())
    found, cosine = apply_gradient_surgery(losses, total, [weight])
    torch.testing.assert_close(found, total)
    assert float(cosine) == pytest.approx(-1 / 2**0.5)
    (found / 4).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([-0.5, 2.5]) / 4)


@pytest.mark.parametrize('key', ['loop1/a', 'loop2/a'])
def test_one_direction_alone_stays_as_it_is(key):
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    losses = {key: 3 * weight.sum()}
    total = losses[key]
    found, cosine = apply_gradient_surgery(losses, total, [weight])
    assert found is total
    assert math.isnan(cosine)


def test_a_checkpointed_graph_is_walked_twice(tiny_config):
    """Gradient surgery takes each direction's gradient from one retained graph."""
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
