"""Which record comes when."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized

import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from projects.llava_sam2_rl.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class VisitSampler(Sampler[int]):
    """Yields visits, ``epoch * len(dataset) + index``, each index once an epoch over all ranks.

    The order is a function of ``(seed, epoch)``. Iteration-based training starts at epoch 0 and,
    on resume, pulls and drops what was trained on already, so it meets the same visits again.

    Args:
        dataset: A :class:`RegionDataset` or :class:`MixedRegionDataset`.
        shuffle: Permutes the records anew each epoch.
        seed: The same on every rank; agreed on by the ranks where ``None``.
        infinite: Goes on with the next epoch by itself. Spares iteration-based training the pause
            and the restart of the workers at each epoch's end; batches may span two epochs.
            Without it the tail of an epoch is filled up with its first visits, so that all ranks
            yield equally many.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        infinite: bool = False,
    ) -> None:
        self.rank, self.world_size = get_dist_info()
        self.size = len(dataset)
        if self.size == 0:
            raise ValueError('VisitSampler: the data set is empty')
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.infinite = infinite
        self.epoch = 0

    def _visits(self, epoch: int) -> list[int]:
        if self.shuffle:
            generator = torch.Generator()
            # A multiplier keeps the epochs of neighbouring seeds apart.
            generator.manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.size, generator=generator)
        else:
            order = torch.arange(self.size)
        return (order + epoch * self.size).tolist()

    def _endless(self) -> Iterator[int]:
        epoch, offset = self.epoch, self.rank
        while True:
            visits = self._visits(epoch)
            yield from visits[offset :: self.world_size]
            # The next epoch goes on with the rank whose turn it is.
            offset = (offset - self.size) % self.world_size
            epoch += 1

    def __iter__(self) -> Iterator[int]:
        if self.infinite:
            return self._endless()
        visits = self._visits(self.epoch)
        total = len(self) * self.world_size
        visits = (visits * math.ceil(total / self.size))[:total]
        return iter(visits[self.rank :: self.world_size])

    def __len__(self) -> int:
        """Visits of one epoch on this rank."""
        return math.ceil(self.size / self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration yields (with ``infinite``: starts from)."""
        self.epoch = epoch
