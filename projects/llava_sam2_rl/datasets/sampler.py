"""Which record comes when."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized

import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from projects.llava_sam2_rl.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class ResumableSampler(Sampler[int]):
    """Yields ``epoch_index = epoch * len(dataset) + index``, each once per epoch over all ranks.

    The order is a function of ``(seed, epoch)``. Iteration-based training starts at epoch 0 and,
    on resume, pulls and drops what was trained on already, so it meets the same items again.

    Args:
        dataset: A :class:`RegionDataset` or :class:`MixedRegionDataset`.
        shuffle: Permutes the records anew each epoch.
        seed: The same on every rank; agreed on by the ranks where ``None``.
        infinite: Goes on with the next epoch by itself. Spares iteration-based training the pause
            and the restart of the workers at each epoch's end; batches may span two epochs.
            Without it the tail of an epoch is filled up with its first records, so that all
            ranks yield equally many. Defaults to False.
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
            raise ValueError('ResumableSampler: the data set is empty')
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.infinite = infinite
        self.epoch = 0

    def _epoch_indices(self, epoch: int) -> list[int]:
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
            indices = self._epoch_indices(epoch)
            yield from indices[offset :: self.world_size]
            # The next epoch goes on with the rank whose turn it is.
            offset = (offset - self.size) % self.world_size
            epoch += 1

    def __iter__(self) -> Iterator[int]:
        if self.infinite:
            return self._endless()
        indices = self._epoch_indices(self.epoch)
        total = len(self) * self.world_size
        indices = (indices * math.ceil(total / self.size))[:total]
        return iter(indices[self.rank :: self.world_size])

    def __len__(self) -> int:
        """Items of one epoch on this rank."""
        return math.ceil(self.size / self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration yields (with ``infinite``: starts from)."""
        self.epoch = epoch
