"""What a metric may ask of the model, and the base of all metrics, which names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.datasets.records import read_image
from projects.llava_sam2_rl.inference.video import VideoSegmentation, segment_texts
from projects.llava_sam2_rl.models.batch import encode_batch
from projects.llava_sam2_rl.models.dual_loop import DualLoopModel
from projects.llava_sam2_rl.models.free_generation import answer_segmentation, describe_regions
from projects.llava_sam2_rl.models.generation import no_gradient
from projects.llava_sam2_rl.models.objectives.rollouts import Rollout
from projects.llava_sam2_rl.rewards import MaskIoUReward
from projects.llava_sam2_rl.rewards.base import Direction
from projects.llava_sam2_rl.structures import ClipSample
from projects.llava_sam2_rl.utils.modules import eval_mode

#: Image tokens that the model sees at a time: 64 tiles of 448 px.
MAX_IMAGE_TOKENS = 64 * 256


class TaskMetric(BaseMetric):
    """A metric of one task; all metrics of this package are.

    Args:
        collect_device: See mmengine's ``BaseMetric``. Defaults to ``'cpu'``.
        prefix: Of the metric's names. Defaults to the class's.
        collect_dir: See mmengine's ``BaseMetric``.
    """

    #: What the model is asked to do: a key of `TASKS`.
    task: str

    def __init__(
        self,
        collect_device: str = 'cpu',
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(collect_device, prefix, collect_dir)
        #: Rows of the last evaluation, one per sample, on the main rank.
        self.rows: list[dict[str, Any]] = []
        #: What a reader of the numbers has to know, by name; the test loop writes it beside them.
        self.notes: dict[str, str] = {}
        #: Where files go; the test loop sets it.
        self.work_dir: Path | None = None


def predict(model: DualLoopModel, batch: Any, tasks: Iterable[str]) -> dict[str, list[Any]]:
    """What the model answers to a batch, task by task, with the weights ``predict_with`` names.

    Args:
        model: The model, not wrapped.
        batch: What `sa2va_collate` made of B samples.
        tasks: Keys of `TASKS`.

    Returns:
        B predictions for every task.
    """
    batch = model.data_preprocessor(batch, False)
    found: dict[str, list[Any]] = {task: [] for task in tasks}
    for data, data_samples in split_batch(batch, model.policy.num_image_tokens):
        for task, predictions in found.items():
            predictions += TASKS[task](model, data, data_samples)
    # Ranks may have split their batches into other numbers of parts.
    model.policy.weights.together()
    return found


def split_batch(
    batch: Mapping[str, Any], tokens_per_tile: int, limit: int = MAX_IMAGE_TOKENS
) -> Iterator[tuple[Mapping[str, Any], Sequence[Any]]]:
    """A batch in parts of bounded memory, each at least one sample.

    Memory grows with the tiles that photographs are cut into, which differ: up to 13 each in the
    official evaluation. A batch with second frames is left whole, as is one within the limit, and
    one of clips, whose frames are read one by one.

    Args:
        batch: What `sa2va_collate` made of B samples.
        tokens_per_tile: Image tokens of a tile.
        limit: Image tokens of a part.

    Yields:
        ``data`` and ``data_samples`` of each part, in order.
    """
    data, samples = batch['data'], batch['data_samples']
    if 'pixel_values' not in data:
        yield data, samples
        return
    tiles = [len(pixels) for pixels in data['pixel_values']]
    if sum(tiles) * tokens_per_tile <= limit or data.get('pair') is not None:
        yield data, samples
        return
    flags = data['vp_overall_mask'].split(tiles)
    start = 0
    while start < len(tiles):
        end = start + 1
        while end < len(tiles) and sum(tiles[start : end + 1]) * tokens_per_tile <= limit:
            end += 1
        part = {
            key: value[start:end] if isinstance(value, list) and len(value) == len(tiles) else value
            for key, value in data.items()
        }
        part['vp_overall_mask'] = torch.cat(flags[start:end])
        # What is told of records is told once, whatever their number.
        part |= {key: data[key] for key in ('skipped', 'changed') if key in data}
        yield part, samples[start:end]
        start = end


def cycle(
    model: DualLoopModel, data: Mapping[str, Any], data_samples: Sequence[Any]
) -> list[dict[str, Any]]:
    """Both cycles and the masks of given captions, as in validation: `DualLoopModel.predict`."""
    return model.predict(data, data_samples)


def referring(
    model: DualLoopModel, data: Mapping[str, Any], data_samples: Sequence[Any]
) -> list[dict[str, Any]]:
    """``answer`` to the sample's caption as a question, and the ``gt_mask`` it is to find."""
    captions = [meta.caption or '' for meta in data_samples]
    with _predicting(model):
        question = model.policy.questions.referring
        answers = answer_segmentation(model.policy, data, captions, data_samples, question=question)
    gt_masks = [masks.any(dim=0).cpu() for masks in data['masks']]
    return [{'answer': a, 'gt_mask': gt} for a, gt in zip(answers, gt_masks, strict=True)]


def captioning(
    model: DualLoopModel, data: Mapping[str, Any], data_samples: Sequence[Any]
) -> list[dict[str, Any]]:
    """``caption`` of the sample's region and its ``reference``."""
    with _predicting(model):
        captions = describe_regions(model.policy, data, [meta.name for meta in data_samples])
    return [
        {'caption': caption, 'reference': meta.caption}
        for caption, meta in zip(captions, data_samples, strict=True)
    ]


def rollouts(
    model: DualLoopModel, data: Mapping[str, Any], data_samples: Sequence[Any]
) -> list[dict[str, Any]]:
    """``iou`` and ``reward`` of the n rollouts of each region, by direction, as in training.

    The policy samples, the teacher makes the return trips. Random numbers start from the same seed
    in every batch, and those of the run are not touched.

    Raises:
        ValueError: The objective has no rewards, the teacher is to be tested, or a record makes
            several samples.
    """
    if not model.objective.has_rewards:
        raise ValueError(
            f'{type(model.objective).__name__} has no rewards to pick rollouts by: test a config '
            'whose objective is GRPOObjective'
        )
    if model.predict_with == 'teacher':
        raise ValueError(
            'rollouts are sampled by the policy and read by the teacher: use --weights policy'
        )
    names = [meta.name for meta in data_samples]
    with torch.random.fork_rng(), no_gradient():
        torch.manual_seed(0)
        batch = encode_batch(model.policy, data, names)
        if len(batch) != len(names):
            raise ValueError(
                f'{len(names)} records make {len(batch)} samples: evaluate on data with one '
                'caption a record (per_object=True of Sa2VAFinetuneDataset)'
            )
        found: dict[Direction, Rollout] = {}
        if batch.regions:
            regions = batch.subset(batch.regions)
            found = model.objective.rollout(model.policy, model.teacher, regions)
    results: list[dict[str, Any]] = [{} for _ in names]
    for direction, rollout in found.items():
        inputs, rewards = rollout.reward_inputs, rollout.scored.rewards.tolist()
        assert inputs is not None
        ious = MaskIoUReward()(inputs)
        for group, sample in enumerate(rollout.samples):
            rows = slice(group * inputs.num_generations, (group + 1) * inputs.num_generations)
            results[batch.regions[sample]][direction] = {'iou': ious[rows], 'reward': rewards[rows]}
    return results


def video(
    model: DualLoopModel, data: Mapping[str, Any], data_samples: Sequence[ClipSample]
) -> list[VideoSegmentation | BadRecord]:
    """The masks of the first ``[SEG]`` of each answer, through its clip, as `Sa2VA.segment_video`.

    Neighbours that are asked for in one clip share its frames: each is read and encoded once.

    Returns:
        What was found, or the frame that cannot be decoded.

    Raises:
        TypeError: The data set has no clips.
    """
    if not all(isinstance(sample, ClipSample) for sample in data_samples):
        raise TypeError(
            'the metric asks for the masks of clips, and the data set has none: take one of '
            'docs/datasets.md, "Video benchmarks", with clip_collate'
        )
    found: list[VideoSegmentation | BadRecord] = []
    for paths, group in groupby(data_samples, key=lambda sample: sample.frames):
        samples = list(group)
        frames = (read_image(path, samples[0].name) for path in paths)
        texts = [sample.caption for sample in samples]
        try:
            with _predicting(model):
                found += segment_texts(model.policy, frames, texts, max_objects=1)
        except BadRecord as error:
            found += [error] * len(samples)
    return found


TASKS: dict[str, Callable[..., list[Any]]] = {
    'cycle': cycle,
    'referring': referring,
    'captioning': captioning,
    'rollouts': rollouts,
    'video': video,
}


@contextmanager
def _predicting(model: DualLoopModel) -> Iterator[None]:
    """The policy without dropout, with the weights that ``predict_with`` names."""
    teacher = model.predict_with == 'teacher'
    with model.teacher_applied() if teacher else nullcontext(), eval_mode(model.policy):
        yield
