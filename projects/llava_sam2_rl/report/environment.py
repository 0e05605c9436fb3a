"""What a run ran on, for people who want to repeat it."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

_PACKAGES = (
    'torch',
    'transformers',
    'mmengine',
    'xtuner',
    'peft',
    'sam2',
    'deepspeed',
    'numpy',
    'llava-sam2-rl',
)
_ROOT = Path(__file__).resolve().parents[3]


def environment() -> dict[str, str]:
    """Names and values, in the order they are shown. No host name, no user, no paths.

    Not mmengine's ``collect_env``, which takes seconds and asks compilers.
    """
    facts = {
        'Python': platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        'system': f'{platform.system()} {platform.release()} {platform.machine()}',
        'processor': _processor(),
        'memory': f'{psutil.virtual_memory().total / 2**30:.1f} GiB',
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts['GPUs'] = ', '.join(f'{names.count(n)} × {n}' for n in sorted(set(names)))
        facts['CUDA'] = str(torch.version.cuda)
    else:
        facts['GPUs'] = 'none'
    facts['git commit'] = _commit(_ROOT)
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'not installed'


def _processor() -> str:
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        lines = info.read_text(errors='replace').splitlines()
        name = next((line.split(':', 1)[1].strip() for line in lines if 'model name' in line), name)
    return f'{name}, {psutil.cpu_count()} cores'


def _commit(folder: Path) -> str:
    """The checked-out commit; an installed package has none."""
    if not (folder / '.git').exists():
        return 'not a git checkout'
    try:
        commit = _git(folder, 'rev-parse', 'HEAD')
        changed = _git(folder, 'status', '--porcelain', '--untracked-files=no')
    except (OSError, subprocess.SubprocessError) as error:
        return f'unknown ({type(error).__name__})'
    return commit + (' with uncommitted changes' if changed else '')


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ['git', '-C', str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()
