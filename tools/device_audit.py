"""What would crash or wait on a GPU, found on a machine without one.

The tiny model runs on a pretended GPU: a second device of PyTorch (its PrivateUse1 backend) whose
memory is the host's, so that dispatch, autograd and device checks are the real ones. Of every
operation it is noted whether CUDA would refuse its mixture of devices, and whether the host would
wait for the GPU: copies (those from pinned memory that are asked not to wait do not), numbers read,
boolean indices, and what waits inside of CUDA's own kernels (multinomial, isin, unique).

It needs a C++ compiler and ninja; the backend is compiled at the first start (20 s). It sees
nothing of code under `device.type == 'cuda'`, of torch.cuda, autocast on CUDA, NCCL and fused
kernels, and nothing of time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]
# One accelerator a process: also where there is a GPU, this looks at the pretended one.
os.environ['CUDA_VISIBLE_DEVICES'] = ''

from devices import pretend_gpu  # noqa: E402
from devices.audit import Audit  # noqa: E402
from devices.scenarios import SCENARIOS, allowed, refused  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'scenarios',
        nargs='*',
        metavar='SCENARIO',
        help=f'of {", ".join(SCENARIOS)} (default: all)',
    )
    parser.add_argument('--top', type=int, default=12, help='lines shown (%(default)s)')
    parser.add_argument('--json', type=Path, help='also write what was counted to this file')
    args = parser.parse_args()
    for name in args.scenarios:
        if name not in SCENARIOS:
            parser.error(f'there is no scenario {name!r}: use some of {", ".join(SCENARIOS)}')
    return args


def check_itself() -> list[str]:
    """What CUDA refuses or waits for and the audit does not, or the other way round."""
    wrong = []
    for name, way in refused():
        audit = Audit()
        try:
            with audit:
                way()
        except RuntimeError:  # PyTorch's own check
            continue
        if not audit.problems:
            wrong.append(f'{name}: no problem found')
    for name, expected, way in allowed():
        audit = Audit()
        with audit:
            way()
        if audit.problems or sum(audit.waits.values()) != expected:
            found = f'{dict(audit.problems)}, {dict(audit.waits)}'
            wrong.append(f'{name}: {found} instead of {expected} waits')
    return wrong


def report(name: str, audit: Audit, top: int) -> str:
    """Problems, operations and waits by phase, and the lines that wait most."""
    lines = [f'== {name}: {len(audit.problems)} problems']
    lines += [f'{n:6d} x {where}: {what}' for (where, what), n in audit.problems.most_common()]
    waits = audit.by_phase()
    lines.append(f'{"phase":14s}{"operations":>12s}{"waits":>8s}')
    for phase in sorted(audit.operations):
        lines.append(f'{phase:14s}{audit.operations[phase]:12d}{waits.get(phase, 0):8d}')
    lines.append(f'{"all":14s}{audit.operations.total():12d}{audit.waits.total():8d}')
    for (phase, where, what), count in audit.waits.most_common(top):
        lines.append(f'{count:6d} {phase:12s} {where}: {what}')
    return '\n'.join(lines)


def main() -> None:
    args = parse_args()
    if lacking := pretend_gpu.missing():
        sys.exit(f'error: the pretended GPU cannot be compiled: {lacking}')
    pretend_gpu.load()
    if wrong := check_itself():
        sys.exit('error: the audit itself is wrong here:\n' + '\n'.join(wrong))
    counted: dict[str, Any] = {}
    for name in args.scenarios or SCENARIOS:
        audit = SCENARIOS[name]()
        print(report(name, audit, args.top), flush=True)
        counted[name] = {
            'problems': [f'{where}: {what}' for where, what in audit.problems],
            'operations': dict(audit.operations),
            'waits': audit.by_phase(),
        }
    if args.json:
        args.json.write_text(json.dumps(counted, indent=1), encoding='utf-8')


if __name__ == '__main__':
    main()
