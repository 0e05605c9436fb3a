"""What would end a run, found in seconds and before anything is loaded.

`check` looks at a config and at the machine, `require` ends the process where something is wrong.
``tools/train.py``, ``tools/test.py`` and ``xtuner train`` do that by themselves, and
``tools/check.py`` does nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mmengine.config import Config

from projects.llava_sam2_rl.engine.dataloader_config import bare_name
from projects.llava_sam2_rl.preflight.data import check_data
from projects.llava_sam2_rl.preflight.device import check_memory, check_precision, check_quantized
from projects.llava_sam2_rl.preflight.disk import check_disk
from projects.llava_sam2_rl.preflight.files import check_checkpoint_folder, model_sizes
from projects.llava_sam2_rl.preflight.judge import check_judges
from projects.llava_sam2_rl.preflight.keys import check_keys
from projects.llava_sam2_rl.preflight.launcher import check_launcher
from projects.llava_sam2_rl.preflight.memory import Sizes, read_sizes
from projects.llava_sam2_rl.preflight.problems import Problem, report

__all__ = ['CHECKS', 'EXIT_CODE', 'Problem', 'check', 'report', 'require']

#: Exit status of a process that was given a config it cannot run.
EXIT_CODE = 2
#: Names for ``preflight.skip``.
CHECKS = ('keys', 'files', 'data', 'precision', 'launcher', 'memory', 'disk', 'judge')


def check(cfg: Config, stages: Sequence[str] = ('train',)) -> list[Problem]:
    """Everything that is wrong with a run, in one list; no weights are read.

    ``preflight = dict(skip=[…])`` in the config leaves checks out, by their names in `CHECKS`.

    Args:
        cfg: Config of a run, with what the command line says in it.
        stages: ``'train'`` (with its validation), ``'test'``, or both.
    """
    problems = _check_skip(cfg)
    if problems:
        return problems
    skipped = _skip(cfg)
    if 'keys' not in skipped:
        problems += check_keys(cfg)
    if 'launcher' not in skipped:
        problems += check_launcher(cfg)
    if not _is_ours(cfg) or not isinstance(cfg.model.get('policy'), dict):
        return problems
    if 'precision' not in skipped:
        problems += check_quantized(cfg)
    wrong_model = any(problem.key.startswith('model.') for problem in problems)
    if 'files' not in skipped:
        problems += check_checkpoint_folder(cfg)
    sizes = None
    if not {'memory', 'disk'} <= skipped and not wrong_model and model_sizes(cfg) is not None:
        sizes, wrong = _sizes(cfg)
        problems += wrong
    for stage in stages:
        by_name: dict[str, Callable[[], list[Problem]]] = {
            'data': partial(check_data, cfg, stage),
            'precision': partial(check_precision, cfg, stage),
            'disk': partial(check_disk, cfg, sizes, stage),
            'judge': partial(check_judges, cfg, stage),
        }
        if sizes is not None:
            by_name['memory'] = partial(check_memory, cfg, sizes, stage)
        for name, run in by_name.items():
            if name not in skipped:
                problems += [found for found in run() if not _is_known(found, problems)]
    return problems


def require(cfg: Config, stages: Sequence[str] = ('train',)) -> None:
    """Prints what is wrong with a run to standard error, and ends the process if it cannot start.

    Of the processes of a machine the first one prints the list, the others one line.

    Raises:
        SystemExit: With status 2.
    """
    problems = check(cfg, stages)
    if not problems:
        return
    fatal = [problem for problem in problems if problem.fatal]
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(report(problems, cfg.filename or 'the config'), file=sys.stderr, flush=True)
    elif fatal:
        keys = ', '.join(problem.key for problem in fatal)
        print(f'rank {os.environ.get("RANK")} does not start: {keys}', file=sys.stderr, flush=True)
    if fatal:
        raise SystemExit(EXIT_CODE)


def _is_ours(cfg: Config) -> bool:
    model: Any = cfg.get('model')
    return isinstance(model, dict) and bare_name(model.get('type', '')) == 'DualLoopModel'


def _is_known(found: Problem, problems: Sequence[Problem]) -> bool:
    """Whether it was said, or follows from an option below it that is wrong."""
    return any(one == found or one.key.startswith(f'{found.key}.') for one in problems)


def _sizes(cfg: Config) -> tuple[Sizes | None, list[Problem]]:
    """The sizes of the model as its classes build it; a model that they refuse is a problem."""
    try:
        return read_sizes(cfg), []
    # Those that the model's classes raise for wrong options.
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OSError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        return None, [Problem('model.policy', text, 'correct the options of model.policy')]


def _skip(cfg: Config) -> set[str]:
    given = (cfg.get('preflight') or {}).get('skip') or ()
    return {given} if isinstance(given, str) else set(given)


def _check_skip(cfg: Config) -> list[Problem]:
    unknown = sorted(_skip(cfg) - set(CHECKS))
    return [
        Problem('preflight.skip', f'there is no check {name!r}', f'one of {", ".join(CHECKS)}')
        for name in unknown
    ]
