"""What every data source shares: its index, plain texts, bad records replaced, repeats and caps."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from projects.llava_sam2_rl.datasets.texts import UnusableText, plain_sample
from projects.llava_sam2_rl.prompts import neutralize_name, printable
from projects.llava_sam2_rl.registry import DATASETS, TRANSFORMS
from projects.llava_sam2_rl.structures import RegionSample

#: ``(source, sample_id, reason)`` of a record that could not be used.
Skipped = tuple[str, str, str]
#: ``(source, sample_id, kind)`` of a record whose texts were changed; a kind of `prompts.MARKUP`,
#: ``cut_text`` or ``cut_conversation``.
Changed = tuple[str, str, str]


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
        return printable(': '.join(part for part in (self.name, self.reason, self.detail) if part))


class RecordDataset(Dataset):
    """What data sources of any kind of record share; those of regions are `RegionDataset`.

    A subclass implements :attr:`num_records` and :meth:`make_item`, and may override
    :meth:`sample_id` and :meth:`image_key`.

    The data set is indexed by ``epoch_index = epoch * len(self) + index``. All that is random about
    an item (which sentence, which replacement) is a function of ``(seed, epoch_index)`` alone,
    whichever worker or rank reads it, so a resumed run sees what the uninterrupted one would have
    seen.

    Args:
        source: Name of the source in logs and reports.
        repeats: How often a record comes up per epoch.
        max_samples: Uses a random subset of at most so many records, chosen by ``seed``.
        max_attempts: Records tried for one item before it fails.
        part: ``'train'`` or ``'val'``: all but ``val_share`` of the pictures, or those. A picture
            is in one of them with all its records. Defaults to None: everything.
        val_share: Share of the pictures that ``part='val'`` has, at least one picture; which is
            decided by their names alone. Defaults to 0.1.
        seed: Of everything random.
    """

    def __init__(
        self,
        source: str,
        repeats: int = 1,
        max_samples: int | None = None,
        max_attempts: int = 20,
        part: str | None = None,
        val_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        for name, value in (('repeats', repeats), ('max_attempts', max_attempts)):
            if value < 1:
                raise ValueError(f'{source}: {name} must be at least 1, got {value}')
        if max_samples is not None and max_samples < 1:
            raise ValueError(f'{source}: max_samples must be at least 1, got {max_samples}')
        if part not in (None, 'train', 'val'):
            raise ValueError(f"{source}: part must be 'train', 'val' or None, got {part!r}")
        if not 0 < val_share < 1:
            raise ValueError(f'{source}: val_share must lie between 0 and 1, got {val_share}')
        self.source = source
        self.repeats = repeats
        self.max_samples = max_samples
        self.max_attempts = max_attempts
        self.part = part
        self.val_share = val_share
        self.seed = seed
        self._members: np.ndarray | None = None
        self._chosen: np.ndarray | None = None

    @property
    def num_records(self) -> int:
        """Records of the source, before ``part``, ``max_samples`` and ``repeats``."""
        raise NotImplementedError

    def make_item(
        self, record: int, rng: np.random.Generator
    ) -> tuple[dict[str, Any], list[Changed]]:
        """The item of record ``record`` in ``range(num_records)``, and what its texts lost.

        Raises:
            BadRecord: The record cannot be used.
        """
        raise NotImplementedError

    def sample_id(self, index: int) -> str:
        """Names record ``index`` without reading it."""
        return str(index)

    def image_key(self, index: int) -> str:
        """Names the picture of record ``index``, without reading it: see ``part``.

        Defaults to the record's own name, as if each had a picture of its own.
        """
        return self.sample_id(index)

    @property
    def num_used(self) -> int:
        """Records used: those of the source or of its part, or ``max_samples`` of them."""
        count = self.num_records if self.part is None else len(self._in_part())
        return count if self.max_samples is None else min(count, self.max_samples)

    def __len__(self) -> int:
        return self.num_used * self.repeats

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One epoch; later epochs are valid indices, so indexing alone would never end."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, epoch_index: int) -> dict[str, Any]:
        """The item, with ``skipped``: the bad records it stands in for, and ``changed``: what was
        changed in its texts.

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
            record = self.record_number(position)
            try:
                item, changed = self.make_item(record, rng)
            except BadRecord as error:
                sample_id, _ = neutralize_name(self.sample_id(record))
                skipped.append((self.source, sample_id, error.reason))
                position = int(rng.integers(self.num_used))
                continue
            item['skipped'] = skipped
            item['changed'] = changed
            return item
        reasons = ', '.join(f'{n} x {r}' for r, n in Counter(s[2] for s in skipped).most_common())
        raise RuntimeError(
            f'{self.source}: {self.max_attempts} records in a row cannot be used ({reasons}), '
            f'the last was {skipped[-1][1]!r}; check the paths of this source'
        )

    def record_number(self, position: int) -> int:
        """The record that stands at ``position`` in ``range(num_used)``."""
        members = None if self.part is None else self._in_part()
        count = self.num_records if members is None else len(members)
        if self.num_used < count:
            if self._chosen is None:
                chooser = np.random.default_rng(self.seed)
                chosen = chooser.choice(count, self.num_used, replace=False, shuffle=False)
                self._chosen = np.sort(chosen)
            position = int(self._chosen[position])
        return position if members is None else int(members[position])

    def _in_part(self) -> np.ndarray:
        """The records of ``part``."""
        if self._members is None:
            keys = [self.image_key(index) for index in range(self.num_records)]
            pictures = sorted(set(keys), key=_by_chance)
            if len(pictures) < 2:
                raise ValueError(
                    f'{self.source}: {len(pictures)} pictures cannot be divided into training and '
                    f'validation; leave part={self.part!r} out'
                )
            count = min(max(round(self.val_share * len(pictures)), 1), len(pictures) - 1)
            held_out = set(pictures[:count])
            wanted = self.part == 'val'
            members = [i for i, key in enumerate(keys) if (key in held_out) == wanted]
            self._members = np.array(members, dtype=np.int64)
        return self._members

    def _name(self, record: int) -> str:
        return f'{self.source}/{neutralize_name(self.sample_id(record))[0]}'


class RegionDataset(RecordDataset):
    """Base of the data sources of regions.

    A subclass implements :attr:`num_records` and :meth:`read`, and may override
    :meth:`sample_id` and :meth:`image_key`.

    Texts are words, whatever the source: special tokens, chat markers, placeholders and control
    characters (`prompts.MARKUP`) become blanks, and what is longer than ``max_caption_tokens`` ends
    with the last sentence that fits. Both are counted by kind, as bad records are by reason.

    Args:
        transforms: Makes a :class:`RegionSample` an item: a callable, its config, or a list of
            either. Without it an item is ``{'sample': RegionSample}``.
        needs_caption: Treats a record without a caption as bad.
        withhold_captions: Gives the samples no caption even where the records have one, to train
            without references.
        max_caption_tokens: Longest caption, question or answer, in tokens as
            `prompts.estimate_tokens` counts them without a tokenizer (a word of English has about
            1.5). A longer one is cut behind a sentence; where the first sentence is too long, the
            record is bad (``long_caption``). A conversation has four times as many, later turns are
            dropped. ``None``: no bound. Defaults to 512.
        source, repeats, max_samples, max_attempts, part, val_share, seed: See `RecordDataset`.
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
        max_caption_tokens: int | None = 512,
        part: str | None = None,
        val_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(source, repeats, max_samples, max_attempts, part, val_share, seed)
        if max_caption_tokens is not None and max_caption_tokens < 1:
            raise ValueError(
                f'{source}: max_caption_tokens must be at least 1 or None, got {max_caption_tokens}'
            )
        if needs_caption and withhold_captions:
            raise ValueError(f'{source}: needs_caption and withhold_captions exclude each other')
        self.transforms = _build_transforms(transforms)
        self.needs_caption = needs_caption
        self.withhold_captions = withhold_captions
        self.max_caption_tokens = max_caption_tokens

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads record ``index`` in ``range(num_records)``.

        Raises:
            BadRecord: The record cannot be used.
        """
        raise NotImplementedError

    def make_item(
        self, record: int, rng: np.random.Generator
    ) -> tuple[dict[str, Any], list[Changed]]:
        """What the transforms make of a record."""
        sample, changed = self.load(record, rng)
        return self._item(sample), changed

    def load(self, record: int, rng: np.random.Generator) -> tuple[RegionSample, list[Changed]]:
        """Record ``record`` as it is trained on, before the transforms: with plain texts.

        Returns:
            The record, and what was changed in its texts.

        Raises:
            BadRecord: The record cannot be used.
        """
        try:
            sample = self.read(record, rng)
            if self.withhold_captions:
                sample = dataclasses.replace(
                    sample,
                    caption=None,
                    distractor=None,
                    region_captions=(None,) * len(sample.region_captions),
                )
            sample, kinds = plain_sample(sample, self.max_caption_tokens)
        except UnicodeDecodeError as error:
            raise BadRecord('bad_encoding', self._name(record), str(error)) from error
        except UnusableText as error:
            raise BadRecord(error.reason, self._name(record), error.detail) from error
        if self.needs_caption and len(sample.texts) < max(1, len(sample.region_captions)):
            raise BadRecord('empty_caption', sample.name)
        return sample, [
            (sample.source, sample.sample_id, kind) for kind, n in kinds.items() for _ in range(n)
        ]

    def _item(self, sample: RegionSample) -> dict[str, Any]:
        if self.transforms is None:
            if sample.num_regions == 0 and (sample.conversation or sample.texts):
                return {'sample': sample}  # it is about the whole image, or nothing in it is meant
            if not sample.mask.any():
                raise BadRecord('empty_mask', sample.name)
            check_frames(sample)
            return {'sample': sample}
        return self.transforms(sample)


def check_frames(sample: RegionSample) -> None:
    """Whether an object can be looked for in the later frames of a sample, where there are any.

    Raises:
        BadRecord: ``empty_mask``, where no later frame shows every region; and of clips
            ``late_mask``, where the first frame does not but a later one does, ``frame_size``,
            where frames differ in size.
    """
    if not sample.has_pair:
        return
    if sample.more_images:
        sizes = {image.shape[:2] for image, _ in sample.frames}
        if len(sizes) > 1:
            raise BadRecord('frame_size', sample.name, f'rows and columns: {sorted(sizes)}')
        if sample.later_frame is not None and sample.num_regions and not sample.mask.any():
            raise BadRecord('late_mask', sample.name, 'the first frame does not show the object')
    if sample.later_frame is None:
        raise BadRecord('empty_mask', sample.name, 'no later frame shows every region')


def _by_chance(name: str) -> bytes:
    """A key that sorts names without regard to what they say."""
    return hashlib.blake2b(name.encode('utf-8', 'backslashreplace'), digest_size=16).digest()


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
        self.datasets: list[RecordDataset] = [
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
