"""Measures what the project claims; each claim is a row of docs/benchmarks.md.

Every sub-command runs both sides of its comparison and prints a table with the command and the
machine; --update-docs puts them in their section of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))

from benchmarks import (  # noqa: E402
    common,
    data,
    growth,
    gumbel,
    gumbel_step,
    learn,
    logprobs,
    propagation,
    return_trip,
    reward_step,
    rollout,
    scale,
    step,
    teacher,
    trl_step,
    zero,
)

#: In the order in which `make bench` runs them; learn takes hours.
COMMANDS = {
    'step': step,
    'trl': trl_step,
    'reward-step': reward_step,
    'rollout': rollout,
    'logprobs': logprobs,
    'gumbel': gumbel,
    'gumbel-step': gumbel_step,
    'return-trip': return_trip,
    'propagation': propagation,
    'teacher': teacher,
    'growth': growth,
    'scale': scale,
    'zero': zero,
    'data': data,
    'learn': learn,
}
PAGE = ROOT / 'docs/benchmarks.md'
PACKAGES = ('torch', 'transformers', 'mmengine')


def build_parser() -> argparse.ArgumentParser:
    """One sub-command per module of tools/benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            '--update-docs', action='store_true', help=f'rewrite the section in {PAGE.name}'
        )
        module.add_arguments(command)
    return parser


def machine() -> str:
    """Processor, cores, memory, accelerator and versions, in one line."""
    import psutil
    import torch

    processor = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        names = [x.split(':')[1] for x in info.read_text().splitlines() if 'model name' in x]
        processor = names[0].strip() if names else processor
    parts = [
        f'{processor}, {len(psutil.Process().cpu_affinity())} cores',
        f'{psutil.virtual_memory().total / 2**30:.0f} GiB',
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts.append(f'Python {platform.python_version()}')
    parts += [f'{name} {metadata.version(name)}' for name in PACKAGES]
    return ', '.join(parts)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ['---'] * len(columns)]
    lines += [[_cell(row.get(column, '')) for column in columns] for row in rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _cell(value: Any) -> str:
    return f'{value:.3g}' if isinstance(value, float) else str(value)


def update_section(page: str, name: str, text: str) -> str:
    """``page`` with the text between the two markers of a section replaced.

    Raises:
        ValueError: The page has no such section.
    """
    start, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    if start not in page or end not in page:
        raise ValueError(f'the page has no section between {start} and {end}')
    before, rest = page.split(start, 1)
    return f'{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}'


def main() -> None:
    args = build_parser().parse_args()
    try:
        rows = COMMANDS[args.command].run(args)
    except common.Skipped as reason:
        print(f'skipped: {reason}')
        return
    command = shlex.join(['python', 'tools/benchmark.py', *sys.argv[1:]])
    command = command.replace(' --update-docs', '')
    text = f'`{command}`\n\n{machine()}\n\n{table(rows)}'
    print(text)
    if args.update_docs:
        page = update_section(PAGE.read_text(encoding='utf-8'), args.command, text)
        PAGE.write_text(page, encoding='utf-8')


if __name__ == '__main__':
    main()
