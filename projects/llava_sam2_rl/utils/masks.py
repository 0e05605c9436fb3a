"""Masks on the grid of the vision tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from projects.llava_sam2_rl.utils.devices import to_host


def prompt_mask_grid(masks: torch.Tensor | np.ndarray, size: int | tuple[int, int]) -> torch.Tensor:
    """The cells of the vision token grid that belong to each region.

    Nearest sampling as in the official model. Where that misses a non-empty mask altogether, every
    cell that the mask touches is set (adaptive max-pooling).

    Args:
        masks: (R, H, W) bool.
        size: Rows and columns of the grid, or one number for both.

    Returns:
        (R, h, w) bool. A region has no cell only where its mask is empty.
    """
    masks = torch.as_tensor(masks)
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f'masks must be (R, H, W) bool, got {tuple(masks.shape)} {masks.dtype}')
    size = (size, size) if isinstance(size, int) else size
    if not len(masks):
        return masks.new_zeros((0, *size))
    rows, columns = (
        _nearest_index(side, cells, masks.device) for side, cells in zip(masks.shape[1:], size)
    )
    grid = masks[:, rows][:, :, columns]
    missed = ~grid.flatten(1).any(1)
    regions = _looked_at_again(missed)
    if len(regions):
        touched = F.adaptive_max_pool2d(masks[regions].float(), size) > 0
        grid[regions] = torch.where(missed[regions, None, None], touched, grid[regions])
    return grid


def _looked_at_again(missed: torch.Tensor) -> torch.Tensor:
    """Numbers of the regions that were missed; of all on a GPU, which would be waited for."""
    if missed.device.type == 'cpu':
        return missed.nonzero().flatten()
    return torch.arange(len(missed), device=missed.device)


def cell_counts(grids: Sequence[torch.Tensor]) -> list[list[int]]:
    """How many cells each region of N grids ``(R, h, w)`` has; a GPU is waited for once."""
    return [counts.tolist() for counts in to_host([grid.flatten(1).sum(1) for grid in grids])]


def _nearest_index(side: int, cells: int, device: torch.device) -> torch.Tensor:
    # Numbered pixels sampled by torch itself: its rounding is part of the official model.
    numbers = torch.arange(side, dtype=torch.float64, device=device)
    return F.interpolate(numbers[None, None], size=cells, mode='nearest')[0, 0].long()
