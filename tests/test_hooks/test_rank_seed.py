"""Every rank samples by random numbers of its own, and builds the model by the same."""

from __future__ import annotations

import random

import numpy as np
import torch
from mmengine.hooks import Hook

from projects.llava_sam2_rl.hooks import RankSeedHook
from test_hooks import toy
from test_hooks.processes import ranks


class Draw(Hook):
    """One number of each generator at the start of the training, and a weight."""

    priority = 'LOWEST'

    def before_train(self, runner):
        weight = runner.model.policy[0].weight[0, 0].item()
        torch.save(
            [weight, random.random(), np.random.rand(), torch.rand(1).item()],
            f'{runner.work_dir}/drawn_{torch.distributed.get_rank()}.pt',
        )


def _train(rank, work_dir):
    hooks = [{'type': RankSeedHook}, {'type': Draw}]
    toy.build(work_dir, hooks=hooks, max_iters=0).train()


def test_ranks_draw_different_numbers_with_the_same_weights(tmp_path):
    for name in ('run', 'again'):
        codes, printed = ranks(_train, 2, tmp_path / 'logs', tmp_path / name)
        assert codes == [0, 0], printed
    first, second = (torch.load(tmp_path / f'run/drawn_{rank}.pt') for rank in range(2))
    assert first[0] == second[0]
    assert all(a != b for a, b in zip(first[1:], second[1:]))
    again = torch.load(tmp_path / 'again/drawn_1.pt')
    assert again == second
