"""Gradient surgery against vectors that can be projected by hand."""

from __future__ import annotations

import math

import pytest
import torch

from projects.llava_sam2_rl.losses import project_conflicting


def test_conflicting_gradients_end_orthogonal():
    # g1 = (1, 0 | 1), g2 = (-2, 3 | 0): g1·g2 = -2, g1·g1 = 2, so g2 + g1 = (-1, 3 | 1).
    first = [torch.tensor([1.0, 0.0]), torch.tensor([1.0])]
    second = [torch.tensor([-2.0, 3.0]), torch.tensor([0.0])]
    projected, cosine = project_conflicting(first, second)
    torch.testing.assert_close(projected, [torch.tensor([-1.0, 3.0]), torch.tensor([1.0])])
    assert float(cosine) == pytest.approx(-2 / math.sqrt(2 * 13))
    assert sum(float((a * b).sum()) for a, b in zip(first, projected)) == pytest.approx(0)


def test_gradients_that_agree_are_left_alone():
    first, second = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]
    projected, cosine = project_conflicting(first, second)
    assert torch.equal(projected[0], second[0])
    assert float(cosine) == pytest.approx(1 / math.sqrt(5 * 10))


def test_a_missing_gradient_is_zero():
    # The second has none where the first points, and the other way round.
    first = [torch.tensor([2.0]), torch.tensor([1.0]), None]
    second = [None, torch.tensor([-5.0]), torch.tensor([4.0])]
    # g1·g2 = -5, g1·g1 = 5: g2 + g1.
    projected, _ = project_conflicting(first, second)
    torch.testing.assert_close(
        projected, [torch.tensor([2.0]), torch.tensor([-4.0]), torch.tensor([4.0])]
    )


def test_a_gradient_of_zero_neither_divides_nor_conflicts():
    projected, cosine = project_conflicting([torch.zeros(2)], [torch.tensor([1.0, -1.0])])
    assert torch.equal(projected[0], torch.tensor([1.0, -1.0]))
    assert float(cosine) == 0


def test_different_lengths_raise():
    with pytest.raises(ValueError, match='1 gradients of one task, 2 of the other'):
        project_conflicting([torch.zeros(1)], [torch.zeros(1)] * 2)
