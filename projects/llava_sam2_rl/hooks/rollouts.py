"""Writes down what was sampled and why it won: a line per completion, and a picture."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from PIL import Image
from torch import Tensor

from projects.llava_sam2_rl.engine.checkpoint_files import INCOMPLETE, write_atomically
from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.registry import HOOKS
from projects.llava_sam2_rl.rewards import matched_iou, track_ious
from projects.llava_sam2_rl.utils.drawing import (
    REGION,
    Card,
    Row,
    Section,
    draw_page,
    film_strip,
    fit,
    found_over_truth,
    overlay,
    resize_image,
    resize_mask,
)

FOLDER = 'rollouts'
#: The loss head that turns a direction's rewards into advantages.
_EXPLANATIONS = {
    'mask_to_caption': (
        'mask → caption → mask′',
        'Yellow: the region. Blue: what the teacher finds for the caption that the policy wrote. '
        'Best first; A is the advantage over the other captions of the region. Clips through which '
        'masks were carried are film strips, line by line.',
    ),
    'caption_to_mask': (
        'caption → mask → caption′',
        'Yellow: the true region. Blue: the mask that the policy sampled for the caption; below '
        'it, what the teacher reads off that mask. Best first; A is the advantage. Clips through '
        'which masks were carried are film strips, line by line.',
    ),
}
# json leaves these as they are, but some readers take them for line ends.
_LINE_ENDS = {code: f'\\u{code:04x}' for code in (0x85, 0x2028, 0x2029)}


@HOOKS.register_module()
class RolloutHook(Hook):
    """Every ``interval`` iterations, the rollouts of that step under ``<work_dir>/rollouts/``.

    A run that is shorter than that has its last step written.

    ``iter_XXXXXXXX.jsonl`` holds one line per completion of the main process: ``iter``,
    ``direction``, ``sample``, ``group`` (index of the prompt in the batch), ``prompt`` (runs of
    image tokens as ``<IMG_CONTEXT>×N``; ``null`` where the objective keeps none), ``completion``
    (also where no reward reads it: in these steps it is written to be seen),
    ``reference``, ``reward``, ``rewards`` by name, ``advantage``, ``length`` in tokens,
    ``truncated`` and ``iou`` of the mask. ``null`` is unscorable or unknown.

    ``iter_XXXXXXXX.png`` shows the first ``max_samples`` of each direction: the image with its
    region, and every completion with its mask, reward parts and advantage, best first; where masks
    were carried through a clip, its frames as a film strip. It also goes to the back ends of
    mmengine's visualizer.

    Every file is written whole or not at all: a killed run leaves no half line, and a resumed one
    replaces the files of the iterations it repeats. Objectives without rollouts (SFT) write
    nothing.

    Args:
        interval: Iterations between two records.
        max_samples: Samples of each direction in the picture; the lines are never cut.
        max_completions: Completions of a sample in the picture; where there are more, the best
            and the worst.

    Raises:
        ValueError: A number is below 1, or ``max_completions`` below 2.
    """

    def __init__(self, interval: int = 50, max_samples: int = 4, max_completions: int = 8) -> None:
        if interval < 1 or max_samples < 1 or max_completions < 2:
            raise ValueError(
                'interval and max_samples must be at least 1 and max_completions at least 2, got '
                f'{interval}, {max_samples} and {max_completions}'
            )
        self.interval = self._interval = interval
        self.max_samples = max_samples
        self.max_completions = max_completions

    def before_train(self, runner: Any) -> None:
        """Removes what a killed run left half-written; says so where there will be no rollouts."""
        objective = unwrapped(runner).objective
        self._interval = min(self.interval, max(1, runner.max_iters))
        if not objective.has_rewards:
            runner.logger.info(
                f'{type(objective).__name__} samples no rollouts: RolloutHook writes nothing'
            )
        if is_main_process():
            for leftover in (Path(runner.work_dir) / FOLDER).glob(f'*{INCOMPLETE}'):
                leftover.unlink()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Has the texts of a step that is due written where no reward reads them, on all ranks."""
        unwrapped(runner).objective.draw_rollouts = self.every_n_train_iters(runner, self._interval)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Writes the two files where the iteration is due."""
        if not self.every_n_train_iters(runner, self._interval) or not is_main_process():
            return
        objective = unwrapped(runner).objective
        rollouts = objective.last_rollouts
        if not rollouts:
            return
        step = runner.iter + 1
        records = {
            direction: [{'iter': step, **record} for record in describe(found)]
            for direction, found in rollouts.items()
        }
        sections = [
            self._section(found, records[direction], data_batch['data'])
            for direction, found in rollouts.items()
        ]
        page = draw_page(sections)
        path = Path(runner.work_dir) / FOLDER / f'iter_{step:08d}'
        lines = [to_line(record) for found in records.values() for record in found]
        write_atomically(path.with_suffix('.jsonl'), ''.join(lines).encode())
        buffer = io.BytesIO()
        Image.fromarray(page).save(buffer, format='png')
        write_atomically(path.with_suffix('.png'), buffer.getvalue())
        runner.visualizer.add_image(FOLDER, page, step)

    # ----------------------------------------------------------------- picture

    def _section(
        self, rollouts: Any, records: Sequence[dict[str, Any]], data: Mapping[str, Any]
    ) -> Section:
        title, explanation = _EXPLANATIONS[rollouts.reward_inputs.direction]
        groups = len(rollouts.samples)
        shown = min(groups, self.max_samples)
        if shown < groups:
            explanation += f' {shown} of {groups} samples shown, all are in the .jsonl beside this.'
        return Section(
            f'iteration {records[0]["iter"]}: {title}',
            explanation,
            [self._row(rollouts, records, group, data) for group in range(shown)],
        )

    def _row(
        self,
        rollouts: Any,
        records: Sequence[dict[str, Any]],
        group: int,
        data: Mapping[str, Any],
    ) -> Row:
        count = rollouts.reward_inputs.num_generations
        sample = rollouts.records[group] if rollouts.records else rollouts.samples[group]
        regions = rollouts.regions[group][None] if rollouts.regions else data['masks'][sample]
        writes = rollouts.reward_inputs.direction == 'mask_to_caption'
        first = first_frame(data, sample)
        # The return trip of a caption happens on the second frame where there is one.
        target = second_frame(data, sample) if writes else None
        reference = records[group * count]['reference']
        tracks = rollouts.reward_inputs.gt_tracks
        length = 1 if tracks is None else len(tracks[group * count])
        question = Card(
            _question_picture(first, regions),
            caption=f'“{reference}”' if reference else '',
            note=_question_note(writes, reference, target is not None, length),
        )
        order = sorted(
            range(group * count, (group + 1) * count),
            key=lambda n: (_or_low(records[n]['reward']), records[n]['advantage']),
            reverse=True,
        )
        ranked = list(enumerate(order, start=1))
        title = records[order[0]]['sample'] or f'sample {sample}'
        values = {records[n]['reward'] for n in order} - {None}
        if not values:
            title += ': no reward could be scored, this group teaches nothing'
        elif all(records[n]['advantage'] == 0 for n in order):
            title += ': all rewards are equal, this group teaches nothing'
        if len(ranked) > self.max_completions:
            best = math.ceil(self.max_completions / 2)
            worst = self.max_completions - best
            title += f' (the best {best} and the worst {worst} of {count})'
            ranked = [*ranked[:best], *ranked[-worst:]]
        frames = [first if target is None else target]
        if length > 1:
            frames = clip_frames(data, sample)
        answers = [self._answer(rollouts, records[n], n, rank, frames) for rank, n in ranked]
        return Row(title, question, answers)

    def _answer(
        self,
        rollouts: Any,
        record: dict[str, Any],
        n: int,
        rank: int,
        frames: Sequence[np.ndarray],
    ) -> Card:
        batch = rollouts.reward_inputs
        if len(frames) > 1:
            track = zip(frames, batch.gt_tracks[n], batch.pred_tracks[n], strict=True)
            picture = film_strip([_answer_picture(*shown) for shown in track])
        else:
            found = batch.pred_mask_logits[n].detach() > 0
            picture = _answer_picture(frames[0], batch.gt_masks[n], found)
        scores = list(record['rewards'].items())
        if len(scores) > 1:
            scores.insert(0, ('reward', record['reward']))
        if not any(name == 'mask_iou' for name, _ in scores):
            scores.append(('IoU (not rewarded)', record['iou']))
        notes = []
        if record['length'] is not None:
            notes.append(f'{record["length"]} tokens')
        if record['truncated']:
            notes.append('cut off at the limit')
        scored = record['reward'] is not None
        return Card(
            picture,
            caption=f'“{record["completion"]}”' if record['completion'] else '(nothing)',
            note=', '.join(notes),
            heading=f'#{rank}' if scored else 'not scored',
            advantage=record['advantage'] if scored else None,
            scores=scores,
        )


def describe(rollouts: Any) -> list[dict[str, Any]]:
    """One record per completion, in the order of the batch; numbers are plain and finite.

    Args:
        rollouts: `Rollout` of one direction, scored.
    """
    batch, rewards = rollouts.reward_inputs, rollouts.rewards
    advantages = rollouts.advantages.tolist()
    totals = rewards.rewards.tolist()
    parts = rewards.rewards_per_func.tolist()
    return [
        {
            'direction': batch.direction,
            'sample': _entry(batch.sample_ids, n),
            'group': n // batch.num_generations,
            'prompt': _short(_entry(batch.prompts, n)),
            'completion': _entry(batch.completions, n),
            'reference': _entry(batch.references, n),
            'reward': _scored(totals[n]),
            'rewards': {
                name: _scored(value) for name, value in zip(rewards.names, parts[n], strict=True)
            },
            'advantage': advantages[n],
            'length': _entry(batch.completion_lengths, n),
            'truncated': _entry(batch.truncated, n),
            'iou': _iou(batch, n),
        }
        for n in range(len(batch))
    ]


def to_line(record: Mapping[str, Any]) -> str:
    """A record as one line of a ``.jsonl`` file."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return text.translate(_LINE_ENDS) + '\n'


def _entry(values: Sequence[Any] | None, n: int) -> Any:
    return None if values is None else values[n]


def _scored(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_low(value: float | None) -> float:
    return -math.inf if value is None else value


def _short(prompt: str | None) -> str | None:
    """An image is hundreds of equal tokens, which nobody wants to scroll through."""
    if prompt is None:
        return None
    return re.sub(r'(<IMG_CONTEXT>){2,}', lambda run: f'<IMG_CONTEXT>×{len(run[0]) // 13}', prompt)


def _iou(batch: Any, n: int) -> float | None:
    if batch.gt_tracks is not None and batch.pred_tracks is not None:
        return track_ious([batch.pred_tracks[n]], [batch.gt_tracks[n]])[0]
    if batch.gt_masks is None or batch.pred_mask_logits is None:
        return None
    return matched_iou(batch.pred_mask_logits[n].detach() > 0, batch.gt_masks[n])


def _question_note(writes: bool, reference: str | None, paired: bool, num_frames: int) -> str:
    parts = ['reference caption, for comparison' if reference else 'no reference caption']
    if not writes:
        parts = ['the caption that was given']
    if num_frames > 1:
        parts.append(f'the mask is carried through {num_frames} frames')
    elif paired:
        parts.append('the way back is on another frame')
    return '; '.join(parts)


def first_frame(data: Mapping[str, Any], sample: int) -> np.ndarray:
    """``(G, G, 3)`` uint8: the first frame of a sample as SAM 2 sees it, aspect not kept."""
    return _rgb(data['g_pixel_values'][sample])


def second_frame(data: Mapping[str, Any], sample: int) -> np.ndarray | None:
    """The same of its second frame; ``None`` where it has none."""
    pair = data.get('pair')
    if pair is None:
        return None
    position = (pair['index'] == sample).nonzero().flatten().tolist()
    return _rgb(pair['g_pixel_values'][position[0]]) if position else None


def clip_frames(data: Mapping[str, Any], sample: int) -> list[np.ndarray]:
    """The same of all T frames of its clip, in order."""
    frames = {0: first_frame(data, sample)}
    for part in (data.get('pair'), data.get('clip')):
        if part is not None:
            for position in (part['index'] == sample).nonzero().flatten().tolist():
                frames[int(part['frame'][position])] = _rgb(part['g_pixel_values'][position])
    return [frames[t] for t in sorted(frames)]


def _rgb(pixels: Tensor) -> np.ndarray:
    return pixels.detach().cpu().permute(1, 2, 0).clamp(0, 255).to(torch.uint8).numpy()


def _question_picture(frame: np.ndarray, gt: Tensor) -> np.ndarray:
    """A frame at the proportions of its masks ``(R, H, W)``, with the regions."""
    size = fit(*gt.shape[-2:])
    return overlay(resize_image(frame, size), _shown(gt, size), REGION)


def _answer_picture(frame: np.ndarray, gt: Tensor, found: Tensor) -> np.ndarray:
    size = fit(*gt.shape[-2:])
    return found_over_truth(resize_image(frame, size), _shown(found, size), _shown(gt, size))


def _shown(masks: Tensor, size: tuple[int, int]) -> np.ndarray:
    return resize_mask(masks.any(0).cpu().numpy(), size)
