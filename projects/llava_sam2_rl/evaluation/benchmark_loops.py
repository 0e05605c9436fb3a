"""mmengine's test and validation loops, asking the model for what each metric needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.runner import BaseLoop, TestLoop
from mmengine.runner.amp import autocast

from projects.llava_sam2_rl.engine.checkpoint_files import write_atomically
from projects.llava_sam2_rl.engine.dataloader_config import runnable_dataloader
from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.engine.loops import DualLoopValLoop
from projects.llava_sam2_rl.evaluation.tasks import TASKS, TaskMetric, predict
from projects.llava_sam2_rl.registry import LOOPS


class _TaskLoop(BaseLoop):
    """Gives every metric the predictions for its own ``task``."""

    stage: str
    runner: Any
    evaluator: Any
    fp16: bool

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any, fp16: bool = False) -> None:
        super().__init__(runner, dataloader, evaluator, fp16)  # type: ignore[call-arg]
        for metric in self.evaluator.metrics:
            if not isinstance(metric, TaskMetric):
                raise TypeError(
                    f'{type(self).__name__}: {type(metric).__name__} does not say what it asks of '
                    'the model; derive it from TaskMetric (evaluation/tasks.py) and give it a task '
                    f'of {", ".join(TASKS)}'
                )

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """One batch."""
        self.runner.call_hook(f'before_{self.stage}_iter', batch_idx=idx, data_batch=data_batch)
        metrics = self.evaluator.metrics
        tasks = sorted({metric.task for metric in metrics})
        with autocast(enabled=self.fp16):
            predictions = predict(unwrapped(self.runner), data_batch, tasks)
        for metric in metrics:
            metric.process(data_batch, predictions[metric.task])
        self.runner.call_hook(
            f'after_{self.stage}_iter',
            batch_idx=idx,
            data_batch=data_batch,
            # The cycle's, where it is asked for: hooks look into those.
            outputs=predictions.get('cycle', predictions[tasks[0]]),
        )


@LOOPS.register_module()
class BenchmarkValLoop(_TaskLoop, DualLoopValLoop):
    """`DualLoopValLoop` for the metrics of this package, together or alone."""

    stage = 'val'


@LOOPS.register_module()
class BenchmarkTestLoop(_TaskLoop, TestLoop):
    """mmengine's ``TestLoop`` for the metrics of this package, together or alone.

    Leaves in the work directory, for weights W (``policy`` or ``teacher``): ``test_W.json`` with
    the numbers, and ``test_W_samples.jsonl`` with a row per metric and sample. Prints a table.

    Args:
        runner: mmengine's.
        dataloader: What is tested, or its config.
        evaluator: Metrics, or their configs.
        fp16: Runs the model under autocast. Defaults to False.
        checkpoint: Name of the tested file in the results. Defaults to the file that the runner
            loads.
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
        super().__init__(runner, runnable_dataloader(dataloader, runner.cfg), evaluator, fp16)
        self.checkpoint = checkpoint

    def run(self) -> dict[str, float]:
        """Tests, writes the results, and returns the numbers.

        Raises:
            RuntimeError: The teacher is to be tested and none was loaded.
        """
        model = unwrapped(self.runner)
        if model.predict_with == 'teacher' and model.teacher.num_updates == 0:
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
            for row in metric.rows
        ]
        result = {
            'weights': weights,
            'config': self.runner.cfg.filename,
            'checkpoint': self.checkpoint or self.runner._load_from,
            'num_samples': len(self.dataloader.dataset),
            'metrics': metrics,
        }
        notes = {metric.prefix: metric.notes for metric in self.evaluator.metrics if metric.notes}
        if notes:
            result['notes'] = notes
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
