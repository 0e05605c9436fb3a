"""What a check found, and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that would end a run, or that a check could not decide.

    Args:
        key: Option at fault by its full path, as ``--cfg-options`` takes it.
        message: What is wrong, with both values where two differ.
        fix: What mends it.
        fatal: ``False`` for a remark: it is shown, and the run starts. Defaults to True.
    """

    key: str
    message: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        return f'{self.key}: {self.message}\n     -> {self.fix}'


def report(problems: Sequence[Problem], name: str = 'the config') -> str:
    """The problems as one numbered list, those that stop the run first.

    Args:
        problems: From `check`.
        name: What the user calls the config.
    """
    fatal = [problem for problem in problems if problem.fatal]
    remarks = [problem for problem in problems if not problem.fatal]
    lines = []
    if fatal:
        what = '1 problem' if len(fatal) == 1 else f'{len(fatal)} problems'
        lines.append(f'{what} in {name}, nothing was started:')
        lines += [f'  {n}. {problem}' for n, problem in enumerate(fatal, 1)]
    lines += [f'  note: {problem}' for problem in remarks]
    return '\n'.join(lines)
