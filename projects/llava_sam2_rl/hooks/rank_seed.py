"""Random numbers of its own for each rank."""

from __future__ import annotations

from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import set_random_seed

from projects.llava_sam2_rl.registry import HOOKS


@HOOKS.register_module()
class RankSeedHook(Hook):
    """Gives every rank random numbers of its own once the model is built.

    mmengine seeds all ranks alike, which building the model needs (LoRA matrices, the reference).
    Sampling needs the contrary, or all ranks would draw their rollouts by the same numbers. Rank 0
    stays as it is. On resume the states of the checkpoint take the place of this seed.
    """

    def before_train(self, runner: Any) -> None:
        """Seeds all ranks but the first."""
        if get_rank() > 0:
            set_random_seed((runner.seed + 1_000_003 * get_rank()) % 2**32)
