"""Checks that an environment holds a stack: exact versions, consistent packages, imports that work.

`pip check` alone would not do: on the default stack it has a complaint that nobody can mend. The
metadata of xtuner 0.2.0 ask for transformers 4.48.0 and bitsandbytes 0.45.0; it works with those of
the stack. What it says of any other package is an error here too.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

EXAMPLES = """\
examples:
  python tools/check_environment.py constraints/newest.txt sam2==1.1.0
"""
#: By distribution, what is imported of it where it is part of the stack; in this order.
MODULES = {
    'torch': ('torch',),
    'torchvision': ('torchvision',),
    'transformers': ('transformers',),
    'bitsandbytes': ('bitsandbytes',),
    'peft': ('peft',),
    'deepspeed': ('deepspeed',),
    'mmengine': ('mmengine.runner', 'mmengine._strategy.deepspeed'),
    'sam2': ('sam2.build_sam',),
    'xtuner': ('xtuner.tools.train', 'xtuner.tools.test'),
}
PROJECT = ('projects.llava_sam2_rl.models', 'projects.llava_sam2_rl.hooks')
# The one package whose metadata are known not to fit, and without which `pip check` is clean.
_EXCUSED = 'xtuner'


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('stack', type=Path, help='file of requirements, as constraints/default.txt')
    parser.add_argument('more', nargs='*', help='requirements that are not in the file')
    return parser


def requirements(file: Path) -> Iterator[Requirement]:
    """The requirements of a file and of those that it reads by ``-r``, where their markers hold."""
    for line in file.read_text(encoding='utf-8').splitlines():
        text = line.partition('#')[0].strip()
        if text.startswith('-r '):
            yield from requirements(file.parent / text[3:].strip())
        elif text:
            yield from _holding([text])


def _holding(texts: Iterable[str]) -> Iterator[Requirement]:
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def wrong_versions(wanted: Iterable[Requirement]) -> Iterator[str]:
    """A line for each package that is missing or of another version."""
    for requirement in wanted:
        try:
            there = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield f'{requirement.name} is not installed, the stack has {requirement}'
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            yield f'{requirement.name} {there} is installed, the stack has {requirement}'


def conflicts(complaints: str) -> tuple[list[str], list[str]]:
    """Lines of ``pip check``: of packages that have to fit, and of the one that need not."""
    lines = [line for line in complaints.splitlines() if ' requires ' in line or ' has ' in line]
    excused = [line for line in lines if line.split()[0] == _EXCUSED]
    return [line for line in lines if line not in excused], excused


def failing_imports(names: Iterable[str]) -> Iterator[str]:
    """A line for each module that cannot be imported."""
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                importlib.import_module(name)
        # Whatever a broken installation raises: that it does is what is looked for.
        except Exception as error:
            reason = str(error).strip().splitlines() or ['']
            yield f'import {name} fails: {type(error).__name__}: {reason[0]}'


def main(argv: list[str] | None = None) -> None:
    """Prints one line where all is well.

    Raises:
        SystemExit: Something is not, with 1; a line for each.
    """
    args = build_parser().parse_args(argv)
    wanted = [*requirements(args.stack), *_holding(args.more)]
    problems = list(wrong_versions(wanted))
    checked = subprocess.run(
        [sys.executable, '-m', 'pip', 'check'], capture_output=True, text=True, check=False
    )
    unfit, excused = conflicts(checked.stdout)
    problems += unfit
    if not problems:
        parts = [name for package in wanted for name in MODULES.get(package.name, ())]
        problems += failing_imports([*parts, *PROJECT])
    if problems:
        lines = '\n'.join(f'  {line}' for line in problems)
        print(
            f'error: this environment is not the stack of {args.stack}:\n{lines}\n'
            f'Make it anew: rm -r {sys.prefix} and `make setup STACK={args.stack.stem}`',
            file=sys.stderr,
        )
        sys.exit(1)
    said = (
        f'; metadata of {_EXCUSED} ask for other versions, which it does not need'
        if excused
        else ''
    )
    print(f'{args.stack}: {len(wanted)} packages at their versions, all imports work{said}')


if __name__ == '__main__':
    main()
