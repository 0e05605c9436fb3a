"""The mask loss of the official Sa2VA recipe: cross-entropy and Dice on sampled points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_loss(
    pred_mask_logits: Tensor,
    gt_masks: Tensor | Sequence[Tensor],
    *,
    bce_weight: float = 2.0,
    dice_weight: float = 0.5,
    num_points: int = 12544,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    generator: torch.Generator | None = None,
    num_masks: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``bce_weight`` x sigmoid cross-entropy + ``dice_weight`` x Dice, on points of each mask.

    Points are normalised coordinates, so a prediction and its ground truth may have different
    sizes and each is read at its own resolution (bilinear, ``align_corners=False``); the official
    code first resizes the ground truth to the prediction's size (nearest). Computed in float32
    whatever the input's dtype.

    Args:
        pred_mask_logits: ``(N, h, w)`` float, before the sigmoid.
        gt_masks: ``(N, H, W)``, or N tensors ``(H_i, W_i)``; bool or numbers 0 and 1.
        bce_weight: Weight of the cross-entropy (mean over points, then over masks). Defaults to 2.
        dice_weight: Weight of the Dice term (mean over masks). Defaults to 0.5.
        num_points: Points per mask. Defaults to 12544 = 112 x 112.
        oversample_ratio: Candidates per point among which the uncertain ones are picked. Defaults
            to 3.
        importance_sample_ratio: Share of the points that are the most uncertain candidates; the
            others are uniformly random.
        generator: Source of the points; torch's default generator where ``None``.
        num_masks: What the sum over masks is divided by; N where ``None``. Give the average over
            ranks to have every mask of a global batch weigh the same.

    Returns:
        The float32 scalar loss, and ``mask_bce`` and ``mask_dice``: detached, unweighted. Without
        masks (N = 0) all are zero and the loss still hangs on the graph.

    Raises:
        ValueError: The shapes are not as above or the numbers of masks differ.
    """
    if pred_mask_logits.ndim != 3:
        raise ValueError(
            f'pred_mask_logits must be (N, h, w), got shape {tuple(pred_mask_logits.shape)}'
        )
    if len(gt_masks) != len(pred_mask_logits):
        raise ValueError(
            f'{len(pred_mask_logits)} predicted masks but {len(gt_masks)} ground-truth masks'
        )
    logits = pred_mask_logits.float()
    if len(logits) == 0:
        zero = logits.sum() * 0.0
        return zero, {'mask_bce': zero.detach(), 'mask_dice': zero.detach()}

    points = uncertain_points(
        logits.detach(),
        num_points,
        oversample_ratio=oversample_ratio,
        importance_sample_ratio=importance_sample_ratio,
        generator=generator,
    )
    point_logits = sample_at(logits, points)
    with torch.no_grad():
        targets = torch.cat(
            [
                sample_at(_as_map(mask, i, logits.device), points[i : i + 1])
                for i, mask in enumerate(gt_masks)
            ]
        )

    divisor = len(logits) if num_masks is None else num_masks
    bce = sigmoid_cross_entropy(point_logits, targets).sum() / divisor
    dice = dice_distance(point_logits.sigmoid(), targets).sum() / divisor
    loss = bce_weight * bce + dice_weight * dice
    return loss, {'mask_bce': bce.detach(), 'mask_dice': dice.detach()}


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``(N, P)`` logits and targets in [0, 1] -> ``(N,)`` cross-entropy, the mean over points."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction='none').mean(dim=1)


def dice_distance(probabilities: Tensor, targets: Tensor, eps: float = 1.0) -> Tensor:
    """``(N, P)`` and ``(N, P)`` in [0, 1] -> ``(N,)``: ``1 - (2 p.g + eps) / (|p| + |g| + eps)``.

    The "naive" Dice of the official recipe: sums of values, not of squares (Milletari et al.,
    "V-Net", 2016, squares them).
    """
    overlap = (probabilities * targets).sum(dim=1)
    size = probabilities.sum(dim=1) + targets.sum(dim=1)
    return 1.0 - (2.0 * overlap + eps) / (size + eps)


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor,
    num_points: int,
    *,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points where a mask is undecided, mixed with random ones.

    Of ``oversample_ratio * num_points`` uniform candidates the ones whose logit is nearest zero
    are kept, ``importance_sample_ratio * num_points`` of them; the rest is drawn anew, uniformly
    (Kirillov et al., "PointRend: Image Segmentation as Rendering", 2020, section 3.1).

    Args:
        mask_logits: ``(N, h, w)`` float.
        num_points: P.
        oversample_ratio: At least 1.
        importance_sample_ratio: In [0, 1].
        generator: Source of the points, on any device.

    Returns:
        ``(N, P, 2)`` float32 in [0, 1): x, y as shares of width and height. The uncertain ones
        come first.

    Raises:
        ValueError: A ratio is out of its range or ``num_points`` is not positive.
    """
    if num_points < 1:
        raise ValueError(f'num_points must be positive, got {num_points}')
    if oversample_ratio < 1.0:
        raise ValueError(f'oversample_ratio must be at least 1, got {oversample_ratio}')
    if not 0.0 <= importance_sample_ratio <= 1.0:
        raise ValueError(
            f'importance_sample_ratio must be in [0, 1], got {importance_sample_ratio}'
        )
    candidates = _random_points(mask_logits, int(num_points * oversample_ratio), generator)
    num_uncertain = int(num_points * importance_sample_ratio)
    uncertainty = -sample_at(mask_logits.float(), candidates).abs()
    chosen = uncertainty.topk(num_uncertain, dim=1).indices
    uncertain = candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))
    others = _random_points(mask_logits, num_points - num_uncertain, generator)
    return torch.cat([uncertain, others], dim=1)


def sample_at(maps: Tensor, points: Tensor) -> Tensor:
    """Reads maps at normalised points, bilinearly.

    Args:
        maps: ``(N, h, w)`` float32.
        points: ``(N, P, 2)``: x, y in [0, 1], where 0 and 1 are the outer edges of the map
            (``align_corners=False``). Outside the map there are zeros.

    Returns:
        ``(N, P)`` float32.
    """
    grid = 2.0 * points.unsqueeze(2) - 1.0
    return F.grid_sample(maps.unsqueeze(1), grid, align_corners=False)[:, 0, :, 0]


def _random_points(like: Tensor, num_points: int, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    points = torch.rand(len(like), num_points, 2, generator=generator, device=device)
    return points.to(like.device)


def _as_map(mask: Tensor, index: int, device: torch.device) -> Tensor:
    if mask.ndim != 2:
        raise ValueError(f'gt_masks[{index}] must be (H, W), got shape {tuple(mask.shape)}')
    return mask.to(device=device, dtype=torch.float32).unsqueeze(0)
