import math

import numpy as np
import pytest
import torch

from projects.llava_sam2_rl.losses.mask import (
    dice_distance,
    mask_loss,
    sample_at,
    sigmoid_cross_entropy,
    uncertain_points,
)


def bilinear(image, x, y):
    """Plain-loop bilinear read with pixel centres at half integers and zeros outside."""
    height, width = image.shape
    col, row = x * width - 0.5, y * height - 0.5
    c0, r0 = math.floor(col), math.floor(row)
    value = 0.0
    for r, c in ((r0, c0), (r0, c0 + 1), (r0 + 1, c0), (r0 + 1, c0 + 1)):
        if 0 <= r < height and 0 <= c < width:
            value += image[r, c] * (1 - abs(row - r)) * (1 - abs(col - c))
    return value


def reference(logits, masks, points, bce_weight=2.0, dice_weight=0.5):
    bces, dices = [], []
    for logit, mask, pts in zip(logits, masks, points):
        z = np.array([bilinear(logit, x, y) for x, y in pts])
        g = np.array([bilinear(mask, x, y) for x, y in pts])
        p = 1 / (1 + np.exp(-z))
        bces.append(np.mean(-g * np.log(p) - (1 - g) * np.log(1 - p)))
        dices.append(1 - (2 * np.sum(p * g) + 1) / (np.sum(p) + np.sum(g) + 1))
    return bce_weight * np.mean(bces) + dice_weight * np.mean(dices), np.mean(bces), np.mean(dices)


def test_zero_logits_by_hand():
    # p = 1/2 everywhere. Away from the border all of the mask is 1, so with importance 0 the
    # points may hit the zero padding; a constant-zero mask is free of that: g = 0.
    loss, metrics = mask_loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), num_points=10)
    dice = 1 - 1 / (5 + 1)  # 2*0+1 over 10*0.5+0+1
    assert metrics['mask_bce'].item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics['mask_dice'].item() == pytest.approx(dice, abs=1e-6)
    assert loss.item() == pytest.approx(2 * math.log(2) + 0.5 * dice, abs=1e-6)


def test_the_two_terms_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # p = 1/2, 3/4
    targets = torch.tensor([[0.0, 1.0]])
    bce = sigmoid_cross_entropy(logits, targets)
    assert bce.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, abs=1e-6)
    dice = dice_distance(logits.sigmoid(), targets)
    assert dice.item() == pytest.approx(1 - 2.5 / 3.25, abs=1e-6)  # 2*.75+1 over 1.25+1+1


def test_agrees_with_a_plain_reference_at_different_sizes():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, 8)).astype(np.float32)
    masks = [(rng.random((9, 5)) > 0.5).astype(float), (rng.random((12, 20)) > 0.5).astype(float)]
    points = uncertain_points(
        torch.from_numpy(logits), 30, generator=torch.Generator().manual_seed(3)
    )
    loss, metrics = mask_loss(
        torch.from_numpy(logits),
        [torch.from_numpy(m).bool() for m in masks],
        num_points=30,
        generator=torch.Generator().manual_seed(3),
    )
    expected, bce, dice = reference(logits, masks, points.numpy().astype(float))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics['mask_bce'].item() == pytest.approx(bce, rel=1e-5)
    assert metrics['mask_dice'].item() == pytest.approx(dice, rel=1e-5)


def test_a_stack_and_a_list_of_masks_are_the_same():
    logits = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = logits > 0.3
    stacked, _ = mask_loss(logits, masks, num_points=50, generator=torch.Generator().manual_seed(1))
    listed, _ = mask_loss(
        logits,
        [m.to(torch.uint8) for m in masks],
        num_points=50,
        generator=torch.Generator().manual_seed(1),
    )
    assert stacked.item() == listed.item()


def test_sample_at_reads_pixel_centres_and_edges():
    image = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.5, 0.5], [0.0, 0.25]]])
    # Centres, the middle of all four, and the left edge: half of pixel 1, half of the padding.
    assert sample_at(image, points).tolist() == [[1.0, 2.0, 2.5, 0.5]]


def test_three_quarters_of_the_points_are_the_most_uncertain():
    # The logit grows from 0 at the left edge to 8 at the right, so uncertain means left.
    logits = torch.linspace(0, 8, 64).expand(1, 64, 64)
    num = 400
    points = uncertain_points(logits, num, generator=torch.Generator().manual_seed(0))
    assert points.shape == (1, num, 2)
    x = points[0, :, 0]
    # 300 of 1200 uniform candidates: the left quarter, give or take.
    assert x[:300].max() < 0.30
    # The last quarter of the points is uniform.
    assert 0.4 < x[300:].mean() < 0.6
    assert x[300:].max() > 0.9
    everything_random = uncertain_points(
        logits, num, importance_sample_ratio=0.0, generator=torch.Generator().manual_seed(0)
    )
    assert 0.45 < everything_random[..., 0].mean() < 0.55


def test_the_generator_decides_the_points():
    logits = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.ones(2, 8, 8)
    state = torch.get_rng_state()

    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        return mask_loss(logits, masks, num_points=20, generator=generator)[0].item()

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is not touched


def test_gradient_reaches_the_logits_and_points_the_right_way():
    logits = torch.zeros(2, 8, 8, requires_grad=True)
    masks = torch.zeros(2, 8, 8)
    masks[0] = 1
    loss, metrics = mask_loss(logits, masks, num_points=200)
    loss.backward()
    assert (logits.grad[0] < 0).float().mean() > 0.9  # raise these logits
    assert (logits.grad[1] > 0).float().mean() > 0.9  # lower those
    assert not any(value.requires_grad for value in metrics.values())
    assert not any('loss' in name for name in metrics)  # mmengine would add such a metric


def test_a_perfect_mask_costs_almost_nothing():
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    # Uniform points: the uncertain ones would all lie on the outline, where targets are between
    # 0 and 1 and no logit is perfect.
    right, _ = mask_loss((mask - 0.5) * 60, mask, importance_sample_ratio=0.0)
    wrong, _ = mask_loss((0.5 - mask) * 60, mask, importance_sample_ratio=0.0)
    assert right < 0.5
    assert wrong > 20


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_computed_in_float32(dtype):
    logits = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    masks = torch.ones(1, 8, 8, dtype=torch.bool)
    low, _ = mask_loss(logits, masks, generator=torch.Generator().manual_seed(0))
    high, _ = mask_loss(logits.float(), masks, generator=torch.Generator().manual_seed(0))
    assert low.dtype == torch.float32
    assert low.item() == high.item()


def test_num_masks_is_the_divisor():
    logits = torch.zeros(2, 4, 4)
    masks = torch.zeros(2, 4, 4)
    mean, _ = mask_loss(logits, masks, num_points=10)
    third, _ = mask_loss(logits, masks, num_points=10, num_masks=6)
    assert third.item() == pytest.approx(mean.item() / 3)


def test_no_masks_give_a_zero_on_the_graph():
    logits = torch.zeros(3, 4, 4, requires_grad=True)
    loss, metrics = mask_loss(logits[:0], [])
    assert loss.item() == 0.0
    assert metrics == {'mask_bce': 0.0, 'mask_dice': 0.0}
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros(3, 4, 4))


@pytest.mark.parametrize(
    ('logits', 'masks', 'message'),
    [
        (torch.zeros(2, 4, 4), torch.zeros(3, 4, 4), '2 predicted masks but 3 ground-truth'),
        (torch.zeros(4, 4), torch.zeros(1, 4, 4), r'must be \(N, h, w\), got shape \(4, 4\)'),
        (torch.zeros(1, 4, 4), [torch.zeros(1, 4, 4)], r'gt_masks\[0\] must be \(H, W\)'),
    ],
)
def test_shapes_that_do_not_fit_are_errors(logits, masks, message):
    with pytest.raises(ValueError, match=message):
        mask_loss(logits, masks)


@pytest.mark.parametrize(
    'options',
    [{'num_points': 0}, {'oversample_ratio': 0.5}, {'importance_sample_ratio': 1.5}],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        mask_loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), **options)
