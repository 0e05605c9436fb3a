"""How likely captions are as descriptions of masks: what rewards of `caption_logps` read.

Captions are given, so nothing is decoded: one pass of a `SharedPrefixForward`, together with all
else that is asked of the images.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.prompting import caption_ids
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.shared_prefix import CompletionHandles, SharedPrefixForward
from projects.llava_sam2_rl.utils.devices import to_host

#: The fields of `RolloutBatch` that are filled in here.
LIKELIHOOD_FIELDS = (
    'caption_logps',
    'caption_logps_no_mask',
    'caption_logps_other_regions',
)


@dataclass(frozen=True, eq=False)
class CaptionQueries:
    """N captions and the masks that they are to describe.

    Args:
        samples: N indices into the batch: whose caption, in which first frame.
        captions: N captions as token ids; ``None`` = nothing is asked.
        same_caption: Whether rollouts of one sample share their caption, so that what does not
            depend on their masks is asked once.
        prompt_masks: N × ``(R, h, w)`` bool; ``None`` entries take the samples' own regions.
    """

    samples: Sequence[int]
    captions: Sequence[Sequence[int] | None]
    same_caption: bool
    prompt_masks: Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class PendingLikelihoods:
    """Captions queued in a `SharedPrefixForward` whose log-probs are wanted."""

    #: ``None`` where nothing had to be asked.
    handles: CompletionHandles | None = None
    #: By field: N entries, each the queued captions that it is made of; ``None`` = no entry.
    entries: dict[str, list[list[int] | None]] = field(default_factory=dict)
    #: Counts for the log.
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CaptionLikelihoods:
    """Log-probs of captions by field of `RolloutBatch`; none where no reward needs any."""

    #: Each a list of N entries, on the CPU.
    fields: dict[str, Any] = field(default_factory=dict)
    #: Counts for the log.
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class _Queue:
    """Regions and captions behind them, each once.

    Masks that cover the same cells are one region: equal masks have equal likelihoods, to the bit.
    """

    batch: RegionBatch
    images: list[int] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    captions: list[Sequence[int]] = field(default_factory=list)
    described: list[int] = field(default_factory=list)
    _regions: dict[tuple[int, bytes], int] = field(default_factory=dict)
    _asked: dict[tuple[int, int], int] = field(default_factory=dict)

    def region(self, sample: int, grid: Tensor, cells: Tensor) -> int:
        """The number of a region of a sample's image; ``cells`` is its grid on the CPU."""
        key = (self.batch.image[sample], cells.numpy().tobytes())
        if key not in self._regions:
            self._regions[key] = len(self.images)
            self.images.append(self.batch.image[sample])
            self.grids.append(grid)
            self.names.append(self.batch.names[sample])
        return self._regions[key]

    def ask(self, region: int, number: int, caption: Sequence[int]) -> int:
        """The number of a caption (``number`` names it) behind a region."""
        key = (region, number)
        if key not in self._asked:
            self._asked[key] = len(self.captions)
            self.captions.append(caption)
            self.described.append(region)
        return self._asked[key]


def reads_likelihoods(needs: Collection[str]) -> bool:
    """Whether some field that is filled in here is needed."""
    return bool(set(needs) & set(LIKELIHOOD_FIELDS))


def queue_likelihoods(
    shared: SharedPrefixForward,
    queries: CaptionQueries,
    needs: Collection[str],
    batch: RegionBatch | None = None,
) -> PendingLikelihoods:
    """Asks for what some fields of `RolloutBatch` hold.

    Args:
        shared: The pass.
        queries: What is asked of.
        needs: Names of fields; those that are not of `LIKELIHOOD_FIELDS` are left out.
        batch: The samples in the frames that are asked about. Defaults to those of the pass, which
            are the first frames.
    """
    policy, batch = shared.policy, shared.batch if batch is None else batch
    size = policy.grid_size
    whole = torch.ones(1, size, size, dtype=torch.bool, device=policy.device)
    given = [whole if grid is None else grid for grid in queries.prompt_masks]
    copies = to_host([*given, *batch.prompt_masks, whole])
    own, true = copies[: len(given)], copies[len(given) : -1]
    queue = _Queue(batch)
    entries: dict[str, list[list[int] | None]] = {
        name: [] for name in LIKELIHOOD_FIELDS if name in needs
    }

    def regions(name: str, n: int, sample: int) -> list[int]:
        """What a field asks rollout ``n`` of."""
        if name == 'caption_logps' and queries.prompt_masks[n] is not None:
            return [queue.region(sample, given[n], own[n])] if has_cells(own[n]) else []
        others = [sample]
        if name != 'caption_logps':
            others = [] if name == 'caption_logps_no_mask' else _other_regions(batch, sample)
        found = [queue.region(i, batch.prompt_masks[i], true[i]) for i in others]
        return found or [queue.region(sample, whole, copies[-1])]

    for n, (sample, caption) in enumerate(zip(queries.samples, queries.captions, strict=True)):
        number = sample if queries.same_caption else n
        for name, column in entries.items():
            asked = [] if caption is None else regions(name, n, sample)
            column.append([queue.ask(m, number, caption or ()) for m in asked] or None)
    handles = None
    if queue.captions:
        handles = shared.add_likelihoods(
            queue.images, queue.grids, queue.names, queue.captions, queue.described
        )
    described = [n for n, caption in enumerate(queries.captions) if caption is not None]
    metrics: dict[str, float] = {}
    if 'caption_logps' in entries:
        metrics['num_masks_without_cell'] = float(sum(not has_cells(own[n]) for n in described))
    if 'caption_logps_other_regions' in entries:
        samples = {queries.samples[n] for n in described}
        alone = [i for i in samples if not _other_regions(batch, i)]
        metrics['num_images_with_one_region'] = float(len(alone))
    return PendingLikelihoods(handles, entries, metrics)


def _other_regions(batch: RegionBatch, sample: int) -> list[int]:
    """The samples that are other regions of a sample's image."""
    image = batch.image[sample]
    return [i for i in batch.describable if batch.image[i] == image and i != sample]


def read_likelihoods(
    shared: SharedPrefixForward, pending: PendingLikelihoods
) -> CaptionLikelihoods:
    """The fields that were asked for, after the pass."""
    rows: list[Tensor] = []
    if pending.handles is not None:
        logps, _ = shared.per_token_logps(pending.handles, 1.0)
        lengths = pending.handles.completion_mask.sum(1).tolist()
        rows = [row[:length] for row, length in zip(logps.float().cpu(), lengths, strict=True)]
    fields = {
        name: [
            None if asked is None else _entry(name, [rows[k] for k in asked]) for asked in column
        ]
        for name, column in pending.entries.items()
    }
    return CaptionLikelihoods(fields, pending.metrics)


def _entry(name: str, rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows)) if name == 'caption_logps_other_regions' else rows[0]


def reference_ids(
    policy: VideoLLaVASAMModel, batch: RegionBatch, samples: Sequence[int], limit: int
) -> tuple[dict[int, list[int] | None], int]:
    """Reference captions as the tokens of an answer, its end included, as SFT learns them.

    Args:
        policy: The network.
        batch: The batch.
        samples: Samples with a caption.
        limit: Most tokens; what is longer is cut.

    Returns:
        By sample: token ids, ``None`` where there is no word or no region to describe; and how many
        captions were cut.
    """
    found: dict[int, list[int] | None] = {}
    cut = 0
    for i in samples:
        caption = batch.reference(i)
        if not len(batch.prompt_masks[i]) or not caption.strip():
            found[i] = None
            continue
        ids = caption_ids(policy, caption)
        cut += len(ids) > limit
        found[i] = ids[:limit]
    return found, cut


def has_cells(grid: Tensor) -> bool:
    """Whether regions ``(R, h, w)`` can be asked about: there are some, and none is empty."""
    return bool(len(grid)) and bool(grid.flatten(1).any(1).all())
