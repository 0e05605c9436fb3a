"""The original way: what it computes equals what the package computes, where neither draws."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def benchmark(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools'))
    import benchmark

    yield benchmark
    for name in [name for name in sys.modules if name.split('.')[0].startswith('benchmark')]:
        sys.modules.pop(name)


@pytest.fixture
def both(benchmark):
    """Loop, original, batch; teacher and policy differ, and no matrix of LoRA is zero."""
    from benchmarks import common, original, step

    args = SimpleNamespace(tokens=12, device='cpu')
    loop = common.build_loop('tiny', step.objective(3), args)
    with torch.no_grad():
        for name, parameter in loop.policy.named_parameters():
            if 'lora_B' in name:
                parameter.normal_(std=0.05)
    theirs = original.Original(loop)
    with torch.no_grad():
        for name, parameter in loop.policy.named_parameters():
            if 'lora_B' in name:
                parameter.normal_(std=0.05)
    # The teacher of the package is what the copy was made of.
    for name, parameter in theirs.teacher.named_parameters():
        if name in loop.teacher._shadows:
            loop.teacher._shadows[name].copy_(parameter)
    return loop, theirs, common.make_batch(loop, 2)


def test_the_same_completions_give_the_same_losses(both):
    loop, theirs, batch = both
    data = batch['data']
    torch.manual_seed(1)
    encoded = loop.encode(data)
    rollouts = loop.objective.roll_out(loop, encoded)
    losses, _ = loop.objective.losses(loop, encoded, rollouts)
    first, second = rollouts['loop1'], rollouts['loop2']
    assert len(set(first.completions.texts)) > 1
    assert float(first.rewards.rewards.std()) > 0

    masks = theirs.return_masks(data, first.completions.texts)
    for ours, low_res, gt in zip(
        first.batch.pred_mask_logits, masks, first.batch.gt_masks, strict=True
    ):
        resized = torch.nn.functional.interpolate(
            low_res[None, None], gt.shape[-2:], mode='bilinear'
        )
        torch.testing.assert_close(ours, resized[0], atol=2e-3, rtol=1e-3)
    reference = theirs.reference_logps(data, first.completions)
    counted = first.completions.completion_mask
    torch.testing.assert_close(first.reference[counted], reference[counted], atol=1e-4, rtol=1e-4)
    loss = theirs.caption_loss(data, first.completions, masks, reference)
    torch.testing.assert_close(losses['loop1/grpo_loss'], loss, atol=1e-4, rtol=1e-3)

    texts = theirs.return_captions(data, second.batch.pred_mask_logits)
    assert texts == list(second.batch.completions)
    assert any(texts)
    found = theirs.mask_losses(
        data, second.actions, second.sigma, second.batch.pred_mask_logits, texts
    )
    torch.testing.assert_close(
        losses['loop2/grpo_loss'], found['loop2/grpo_loss'], atol=1e-4, rtol=1e-3
    )


def test_the_gradients_agree(both):
    loop, theirs, batch = both
    data = batch['data']
    torch.manual_seed(1)
    encoded = loop.encode(data)
    rollouts = loop.objective.roll_out(loop, encoded)
    names = ('mlp1.1.weight', 'layers.0.self_attn.k_proj.lora_B.default.weight')
    watched = [p for n, p in loop.policy.named_parameters() if n.endswith(names)]
    losses, _ = loop.objective.losses(loop, encoded, {'loop1': rollouts['loop1']})
    ours = torch.autograd.grad(losses['loop1/grpo_loss'], watched)
    completions = rollouts['loop1'].completions
    masks = theirs.return_masks(data, completions.texts)
    reference = theirs.reference_logps(data, completions)
    plain = torch.autograd.grad(theirs.caption_loss(data, completions, masks, reference), watched)
    for a, b in zip(ours, plain, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()) + 1e-6, rtol=1e-2)


def test_the_copy_moves_as_the_shadows_do(both):
    loop, theirs, _ = both
    with torch.no_grad():
        loop.policy.mlp1[1].weight.add_(1.0)
    loop.update_teacher()
    theirs.update_teacher()
    shadow = loop.teacher.state_dict()['shadows']['mlp1.1.weight']
    torch.testing.assert_close(theirs.teacher.mlp1[1].weight, shadow, atol=1e-6, rtol=0)
