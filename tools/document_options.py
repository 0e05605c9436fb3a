"""Writes docs/configuration.md: every option of what a config names, from the docstrings.

A test compares the page with the code, so that neither can change alone.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / 'docs/configuration.md'
HEAD = """\
# Configuration reference

A config is Python: `_base_` files of literals, and what differs from them. Every value can be
overridden by its path, as `--cfg-options model.objective.beta=0.05
default_hooks.rollouts.interval=10 dataset_defaults.RefCOCODataset.data_root=/data/refer_seg`; a
name that does not exist is an error that names the nearest one. Where things stand in a config:

| path | what |
|---|---|
| `model` | `DualLoopModel`: policy, objective, teacher, weights of the directions |
| `model.policy` | `VideoLLaVASAMModel`: checkpoint (which has the sizes), LoRA, what is trained |
| `model.objective` | `GRPOObjective`, `GumbelObjective` or `SFTObjective` |
| `model.objective.mask_to_caption.reward`, `….caption_to_mask.reward` | rewards of GRPO |
| `train_dataloader.dataset.datasets` | the data sources |
| `default_hooks`, `custom_hooks` | this package's hooks by name; your own |
| `dataset_defaults` | options of all data sets of a class, as where they lie |
| `val_evaluator`, `test_evaluator` | metrics |
| `train_cfg` | `DualLoopTrainLoop`: `max_iters=…` or `max_epochs=…`, validation |
| `param_scheduler` | `WarmupCosineLR`, which ends with the run |
| `optim_wrapper`, `env_cfg`, … | mmengine's and xtuner's own |

This page is written by `python tools/document_options.py` from the docstrings.
"""


def documented() -> dict[str, list[type]]:
    """The classes of the page by its sections."""
    from projects.llava_sam2_rl import datasets, evaluation, hooks, models, rewards
    from projects.llava_sam2_rl.engine import loops, schedules
    from projects.llava_sam2_rl.models import schedule
    from projects.llava_sam2_rl.models.objectives.grpo_caption_to_mask import CaptionToMaskOptions
    from projects.llava_sam2_rl.models.objectives.grpo_mask_to_caption import MaskToCaptionOptions
    from projects.llava_sam2_rl.prompts import Questions

    def of(module: object, endings: tuple[str, ...]) -> list[type]:
        names = [n for n in module.__all__ if n.endswith(endings)]  # type: ignore[attr-defined]
        return [x for x in (getattr(module, n) for n in names) if inspect.isclass(x)]

    scored = [
        x for x in of(rewards, ('Reward', 'Rewards')) if not getattr(x, '_is_protocol', False)
    ]
    return {
        'Run': [loops.DualLoopTrainLoop, loops.DualLoopValLoop, schedules.WarmupCosineLR],
        'Model': [
            models.DualLoopModel,
            models.VideoLLaVASAMModel,
            Questions,
            models.EMATeacher,
            schedule.AdaptiveWeights,
            schedule.Curriculum,
        ],
        'Objectives': [
            models.GRPOObjective,
            MaskToCaptionOptions,
            CaptionToMaskOptions,
            models.GumbelObjective,
            schedule.GeometricSchedule,
            models.SFTObjective,
        ],
        'Rewards': scored,
        'Data': [
            datasets.Sa2VATransform,
            *of(datasets, ('Dataset', 'Scenes', 'Collages', 'Photographs', 'Sampler')),
        ],
        'Hooks': of(hooks, ('Hook',)),
        'Evaluation': of(evaluation, ('Metric', 'Loop', 'Dataset')),
    }


def arguments(docstring: str) -> dict[str, str]:
    """The ``Args:`` of a docstring: name -> meaning."""
    found = re.search(r'^Args:\n(.*?)(?:\n\S|\Z)', inspect.cleandoc(docstring), re.M | re.S)
    if found is None:
        return {}
    entries = re.findall(r'^    (\w+): (.*?)(?=^    [*\w]|\Z)', found[1] + '\n', re.M | re.S)
    return {name: ' '.join(text.split()) for name, text in entries}


def options(cls: type) -> Iterable[tuple[str, str, str]]:
    """``(name, default, meaning)`` of each option; a base class documents what it takes."""
    meanings: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if _package(base) == _package(cls)]):
        meanings.update(arguments(base.__doc__ or ''))
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = 'required'
        if parameter.default is not parameter.empty:
            default = f'`{parameter.default!r}`'
        yield parameter.name, default, meanings.get(parameter.name, '')


def inherited(cls: type) -> str:
    """Where an option that this project does not document comes from."""
    base = next(base for base in cls.__mro__ if _package(base) != _package(cls))
    return f"as of {_package(base)}'s `{base.__name__}`"


def table(cls: type) -> str:
    """A class's heading, first sentence and options."""
    summary = inspect.cleandoc(cls.__doc__ or '').split('\n\n')[0]
    rows = [
        f'| `{name}` | {default} | {_plain(meaning) or inherited(cls)} |'
        for name, default, meaning in options(cls)
    ]
    head = ['| option | default | meaning |', '|---|---|---|'] if rows else []
    return '\n'.join(
        [f'### {cls.__name__}', '', _plain(' '.join(summary.split())), '', *head, *rows]
    )


def _package(cls: type) -> str:
    return cls.__module__.split('.')[0]


def _plain(text: str) -> str:
    return text.replace('``', '`').replace('|', '\\|')


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section, classes in documented().items():
        parts += [f'## {section}\n', *(table(cls).rstrip() + '\n' for cls in classes)]
    return '\n'.join(parts)


def main() -> None:
    """Writes the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding='utf-8')


if __name__ == '__main__':
    main()
