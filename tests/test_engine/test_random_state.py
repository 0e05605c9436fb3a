import io
import random

import numpy as np
import pytest
import torch

from projects.llava_sam2_rl.engine.random_state import get_random_state, set_random_state


def draw():
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(1).item(),
    )


@pytest.mark.parametrize('odd', [False, True])
def test_the_same_numbers_again_through_a_file(odd):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if odd:  # half of a Gaussian pair is waiting in Python's and numpy's generators
        random.gauss(0, 1)
        np.random.randn()
    buffer = io.BytesIO()
    torch.save(get_random_state(), buffer)
    buffer.seek(0)
    expected = [draw() for _ in range(3)]
    draw()
    set_random_state(torch.load(buffer, weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_taking_the_state_draws_nothing():
    torch.manual_seed(0)
    first = torch.rand(1).item()
    torch.manual_seed(0)
    get_random_state()
    assert torch.rand(1).item() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_state():
    state = get_random_state()
    expected = torch.rand(3, device='cuda')
    set_random_state(state)
    assert torch.equal(torch.rand(3, device='cuda'), expected)
