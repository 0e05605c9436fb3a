"""What every data source shares: its index, replacement of bad records, repeats and caps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from projects.llava_sam2_rl.registry import DATASETS, TRANSFORMS
from projects.llava_sam2_rl.structures import RegionSample

#: ``(source, sample_id, reason)`` of a record that could not be used.
Skipped = tuple[str, str, str]


class BadRecord(Exception):
    """A record that cannot be used; another one of the same source takes its place.

    Args:
        reason: Short snake_case key that bad records are counted by, e.g. ``missing_image``.
        name: ``source/sample_id`` or the file at fault.
        detail: What exactly is wrong.
    """

    def __init__(self, reason: str, name: str = '', detail: str = '') -> None:
        super().__init__(reason, name, detail)
        self.reason = reason
        self.name = name
        self.detail = detail

    def __str__(self) -> str:
        return ': '.join(part for part in (self.name, self.reason, self.detail) if part)


class RegionDataset(Dataset):
    """Base of the data sources.

    A subclass implements :attr:`num_records` and :meth:`read`, and may override
    :meth:`sample_id`.

    The data set is indexed by ``epoch_index = epoch * len(self) + index``. All that is random about
    an item (which sentence, which replacement) is a function of ``(seed, epoch_index)`` alone,
    whichever worker or rank reads it, so a resumed run sees what the uninterrupted one would have
    seen.

    Args:
        source: Name of the source in logs and reports.
        transforms: Makes a :class:`RegionSample` an item: a callable, its config, or a list of
            either. Without it an item is ``{'sample': RegionSample}``.
        repeats: How often a record comes up per epoch.
        max_samples: Uses a random subset of at most so many records, chosen by ``seed``.
        needs_caption: Treats a record without a caption as bad.
        withhold_captions: Gives the samples no caption even where the records have one, to train
            without references.
        max_attempts: Records tried for one item before it fails.
        seed: Of everything random.
    """

    def __init__(
        self,
        source: str,
        transforms: Any = None,
        repeats: int = 1,
        max_samples: int | None = None,
        needs_caption: bool = False,
        withhold_captions: bool = False,
        max_attempts: int = 20,
        seed: int = 0,
    ) -> None:
        for name, value in (('repeats', repeats), ('max_attempts', max_attempts)):
            if value < 1:
                raise ValueError(f'{source}: {name} must be at least 1, got {value}')
        if max_samples is not None and max_samples < 1:
            raise ValueError(f'{source}: max_samples must be at least 1, got {max_samples}')
        self.source = source
        self.transforms = _build_transforms(transforms)
        self.repeats = repeats
        self.max_samples = max_samples
        if needs_caption and withhold_captions:
            raise ValueError(f'{source}: needs_caption and withhold_captions exclude each other')
        self.needs_caption = needs_caption
        self.withhold_captions = withhold_captions
        self.max_attempts = max_attempts
        self.seed = seed
        self._chosen: np.ndarray | None = None

    @property
    def num_records(self) -> int:
        """Records of the source, before ``max_samples`` and ``repeats``."""
        raise NotImplementedError

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads record ``index`` in ``range(num_records)``.

        Raises:
            BadRecord: The record cannot be used.
        """
        raise NotImplementedError

    def sample_id(self, index: int) -> str:
        """Names record ``index`` without reading it."""
        return str(index)

    @property
    def num_used(self) -> int:
        """Records used: those of the source, or ``max_samples`` of them."""
        if self.max_samples is None:
            return self.num_records
        return min(self.num_records, self.max_samples)

    def __len__(self) -> int:
        return self.num_used * self.repeats

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One epoch; later epochs are valid indices, so indexing alone would never end."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, epoch_index: int) -> dict[str, Any]:
        """The item, with ``skipped``: the bad records it stands in for.

        Raises:
            IndexError: ``epoch_index`` is negative or the source is empty.
            RuntimeError: ``max_attempts`` records were bad, one after the other.
        """
        if epoch_index < 0 or not len(self):
            raise IndexError(f'{self.source}: no index {epoch_index} of {len(self)} records')
        rng = np.random.default_rng([self.seed, epoch_index])
        position = epoch_index % len(self) % self.num_used
        skipped: list[Skipped] = []
        for _ in range(self.max_attempts):
            record = self._record(position)
            try:
                item = self._item(record, rng)
            except BadRecord as error:
                skipped.append((self.source, self.sample_id(record), error.reason))
                position = int(rng.integers(self.num_used))
                continue
            item['skipped'] = skipped
            return item
        reasons = ', '.join(f'{n} x {r}' for r, n in Counter(s[2] for s in skipped).most_common())
        raise RuntimeError(
            f'{self.source}: {self.max_attempts} records in a row cannot be used ({reasons}), '
            f'the last was {skipped[-1][1]!r}; check the paths of this source'
        )

    def _record(self, position: int) -> int:
        if self.num_used == self.num_records:
            return position
        if self._chosen is None:
            chooser = np.random.default_rng(self.seed)
            chosen = chooser.choice(self.num_records, self.num_used, replace=False, shuffle=False)
            self._chosen = np.sort(chosen)
        return int(self._chosen[position])

    def _item(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        sample = self.read(record, rng)
        if self.needs_caption and len(sample.texts) < max(1, len(sample.region_captions)):
            raise BadRecord('empty_caption', sample.name)
        if self.withhold_captions:
            sample = dataclasses.replace(
                sample,
                caption=None,
                distractor=None,
                region_captions=(None,) * len(sample.region_captions),
            )
        if self.transforms is None:
            if sample.num_regions == 0 and (sample.conversation or sample.texts):
                return {'sample': sample}  # it is about the whole image, or nothing in it is meant
            if not sample.mask.any() or (sample.mask2 is not None and not sample.mask2.any()):
                raise BadRecord('empty_mask', sample.name)
            return {'sample': sample}
        return self.transforms(sample)


def _build_transforms(transforms: Any) -> Callable[[RegionSample], dict[str, Any]] | None:
    if transforms is None:
        return None
    if isinstance(transforms, dict):
        return TRANSFORMS.build(transforms)
    if isinstance(transforms, (list, tuple)):
        steps = [_build_transforms(step) for step in transforms]

        def chain(value: Any) -> Any:
            for step in steps:
                value = value if step is None else step(value)
            return value

        return chain
    if callable(transforms):
        return transforms
    raise TypeError(f'transforms must be a callable, a config or a list, got {type(transforms)}')


@DATASETS.register_module()
class MixedRegionDataset(Dataset):
    """Several sources, one after the other.

    ``epoch * len(self) + index`` becomes the ``epoch_index``, in the same epoch, of the source that
    ``index`` falls into.

    Args:
        datasets: Sources or their configs.
    """

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets: list[RegionDataset] = [
            DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
            for dataset in datasets
        ]
        if not self.datasets:
            raise ValueError('MixedRegionDataset needs at least one source')
        sizes = [len(dataset) for dataset in self.datasets]
        if min(sizes) == 0:
            empty = [d.source for d, size in zip(self.datasets, sizes) if size == 0]
            raise ValueError(f'sources without a single record: {", ".join(empty)}')
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, epoch_index: int) -> dict[str, Any]:
        """The item of the source that the index falls into."""
        if epoch_index < 0:
            raise IndexError(f'no index {epoch_index}')
        epoch, index = divmod(epoch_index, len(self))
        which = int(np.searchsorted(self._ends, index, side='right'))
        dataset = self.datasets[which]
        start = int(self._ends[which]) - len(dataset)
        return dataset[epoch * len(dataset) + index - start]
