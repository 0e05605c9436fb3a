"""Test and validation loops that ask the model what each metric needs, and leave results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.runner import TestLoop
from mmengine.runner.amp import autocast

from projects.llava_sam2_rl.engine.checkpoint_files import write_atomically
from projects.llava_sam2_rl.engine.dataloader_config import complete_dataloader
from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.engine.loops import DualLoopValLoop
from projects.llava_sam2_rl.models.dual_loop import DualLoopModel, eval_mode
from projects.llava_sam2_rl.models.free_generation import answer_segmentation, describe_regions
from projects.llava_sam2_rl.registry import LOOPS


def referring(loop: DualLoopModel, data: dict, samples: Sequence[Any]) -> list[dict[str, Any]]:
    """``answer`` to the sample's caption as a question, and the ``gt_mask`` it is to find."""
    answers = answer_segmentation(
        loop.policy, data, [meta.caption or '' for meta in samples], samples
    )
    truths = [masks.any(dim=0).cpu() for masks in data['masks']]
    return [{'answer': a, 'gt_mask': gt} for a, gt in zip(answers, truths, strict=True)]


def captioning(loop: DualLoopModel, data: dict, samples: Sequence[Any]) -> list[dict[str, Any]]:
    """``caption`` of the sample's region and its ``reference``."""
    names = [meta.name for meta in samples]
    captions = describe_regions(loop.policy, data, names)
    return [
        {'caption': text, 'reference': meta.caption}
        for text, meta in zip(captions, samples, strict=True)
    ]


def predict(loop: DualLoopModel, batch: Any, tasks: Sequence[str]) -> dict[str, list[Any]]:
    """What the model answers to a batch, task by task, with the weights ``predict_with`` names.

    Args:
        loop: The model, not wrapped.
        batch: What `sa2va_collate` made.
        tasks: ``'cycle'`` and those of `TASKS`.
    """
    batch = loop.data_preprocessor(batch, False)
    data, samples = batch['data'], batch['data_samples']
    predictions = {'cycle': loop.predict(data, samples)} if 'cycle' in tasks else {}
    teacher = loop.predict_with == 'teacher'
    with loop.teacher_applied() if teacher else nullcontext(), eval_mode(loop.policy):
        for task in tasks:
            if task != 'cycle':
                predictions[task] = TASKS[task](loop, data, samples)
    return predictions


#: Beside ``'cycle'``, which is `DualLoopModel.predict`.
TASKS: dict[str, Callable[..., list[Any]]] = {
    'referring': referring,
    'captioning': captioning,
}


class _AsksForTasks:
    """Gives every metric the predictions for its own ``task``."""

    stage: str
    runner: Any
    evaluator: Any
    fp16: bool

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """One batch."""
        self.runner.call_hook(f'before_{self.stage}_iter', batch_idx=idx, data_batch=data_batch)
        metrics = self.evaluator.metrics
        tasks = sorted({getattr(metric, 'task', 'cycle') for metric in metrics})
        with autocast(enabled=self.fp16):
            predictions = predict(unwrapped(self.runner), data_batch, tasks)
        for metric in metrics:
            metric.process(data_batch, predictions[getattr(metric, 'task', 'cycle')])
        self.runner.call_hook(
            f'after_{self.stage}_iter',
            batch_idx=idx,
            data_batch=data_batch,
            # The cycle's, where it is asked for: hooks look into those.
            outputs=predictions.get('cycle', predictions[tasks[0]]),
        )


@LOOPS.register_module()
class BenchmarkValLoop(_AsksForTasks, DualLoopValLoop):
    """`DualLoopValLoop` for the metrics of this package, together or alone."""

    stage = 'val'


@LOOPS.register_module()
class BenchmarkTestLoop(_AsksForTasks, TestLoop):
    """mmengine's ``TestLoop`` for the metrics of this package, together or alone.

    Leaves in the work directory, for weights W (``policy`` or ``teacher``): ``test_W.json`` with
    the numbers, and ``test_W_samples.jsonl`` with a row per metric and sample. Prints a table.

    Args:
        runner: mmengine's.
        dataloader: What is tested, or its config.
        evaluator: Metrics, or their configs.
        fp16: Whether autocast is on.
        checkpoint: Named in the results.
    """

    stage = 'test'

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any,
        fp16: bool = False,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__(runner, complete_dataloader(dataloader, runner.cfg), evaluator, fp16)
        self.checkpoint = checkpoint

    def run(self) -> dict[str, float]:
        """Tests, writes the results, and returns the numbers.

        Raises:
            RuntimeError: The teacher is to be tested and none was loaded.
        """
        loop = unwrapped(self.runner)
        if loop.predict_with == 'teacher' and loop.teacher.num_updates == 0:
            raise RuntimeError(
                'no teacher was loaded, and a teacher that never moved is the base model. '
                '`xtuner test --checkpoint` loads the policy alone: use '
                '`python tools/test.py CONFIG --checkpoint FILE --weights teacher`'
            )
        folder = Path(self.runner.work_dir)
        for metric in self.evaluator.metrics:
            metric.work_dir = folder
        metrics = super().run()
        if is_main_process():
            self._write(folder, metrics)
        return metrics

    def _write(self, folder: Path, metrics: dict[str, float]) -> None:
        weights = unwrapped(self.runner).predict_with
        rows = [
            {'metric': metric.prefix, **row}
            for metric in self.evaluator.metrics
            for row in getattr(metric, 'rows', ())
        ]
        result = {
            'weights': weights,
            'config': self.runner.cfg.filename,
            'checkpoint': self.checkpoint or self.runner._load_from,
            'num_samples': len(self.dataloader.dataset),
            'metrics': metrics,
        }
        text = json.dumps(result, indent=2, ensure_ascii=False) + '\n'
        write_atomically(folder / f'test_{weights}.json', text.encode())
        lines = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
        write_atomically(folder / f'test_{weights}_samples.jsonl', lines.encode())
        self.runner.logger.info(
            f'{weights}, {result["num_samples"]} samples: {folder / f"test_{weights}.json"}\n'
            + table(metrics)
        )


def table(metrics: dict[str, float]) -> str:
    """One line per number; counts are whole."""
    width = max((len(name) for name in metrics), default=0)
    return '\n'.join(
        f'  {name:<{width}}  {value:>9d}'
        if isinstance(value, int)
        else f'  {name:<{width}}  {value:>9.4f}'
        for name, value in metrics.items()
    )
