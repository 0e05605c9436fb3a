"""Copies between host and device; what keeps a GPU from being waited for is in the device audit."""

from __future__ import annotations

import torch

from projects.llava_sam2_rl.utils.devices import to_device, to_host, true_places
from projects.llava_sam2_rl.utils.masks import cell_counts


def test_many_tensors_at_once():
    given = [torch.arange(6).view(2, 3), torch.tensor(7), torch.empty(0, 4, dtype=torch.int64)]
    found = to_host(given)
    assert [x.tolist() for x in found] == [[[0, 1, 2], [3, 4, 5]], 7, []]
    assert [x.shape for x in found] == [x.shape for x in given]
    assert to_host([]) == []


def test_a_cpu_needs_no_copy():
    given = torch.ones(2)
    assert to_device(given, 'cpu') is given


def test_places_are_in_order():
    mask = torch.tensor([False, True, True, False, True])
    assert true_places(mask, 3).tolist() == [1, 2, 4]
    assert true_places(~mask, 2).tolist() == [0, 3]
    torch.manual_seed(0)
    long = torch.rand(5000) < 0.3
    assert torch.equal(true_places(long, int(long.sum())), long.nonzero().flatten())


def test_cells_of_regions():
    grids = [torch.zeros(2, 3, 3, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool)]
    grids[0][1, 0, :2] = True
    assert cell_counts(grids) == [[0, 2], [4]]
    assert cell_counts([grids[0][:0]]) == [[]]
