"""The versions that this package is tested with, and mixtures that fail at import.

Versions are read from the metadata of what is installed; nothing of it is imported, because a bad
mixture fails in the middle of that with an error about something else.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from projects.llava_sam2_rl.utils.errors import StackError

#: First and last tested version. The last stands for all its patch releases. Models, losses,
#: checkpoints, launching and training are tested at both ends and between (docs/stacks.md).
TESTED = {
    'python': ('3.11', '3.13'),
    'torch': ('2.5.1', '2.14'),
    'transformers': ('4.48.0', '5.24'),
}

#: Set to 1 it lets other versions pass, with a warning. An environment variable because the check
#: comes before any config is read: what reads configs needs the packages that are checked.
OVERRIDE = 'LLAVA_SAM2_RL_ALLOW_UNTESTED'

#: From a version of the first package on, the second is needed in a version at least, and why.
_TOGETHER = (
    ('torch', '2.6', 'bitsandbytes', '0.49.2', 'fails at import, and takes peft with it, beside'),
    ('transformers', '5.0.0', 'torch', '2.6.0', 'is ignored by'),
)


def installed_versions() -> dict[str, str]:
    """Version of Python and of each package that is looked at, where it is installed.

    ``'torchvision wants torch'`` is what the metadata of torchvision ask for: ``'==2.5.1'``.
    """
    found = {'python': platform.python_version()}
    for name in ('torch', 'torchvision', 'transformers', 'bitsandbytes'):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an import will say so, if it is needed
    if 'torchvision' in found:
        for requirement in map(Requirement, metadata.requires('torchvision') or ()):
            if requirement.name == 'torch':
                found['torchvision wants torch'] = str(requirement.specifier)
    return found


def check_versions(versions: Mapping[str, str] | None = None) -> None:
    """Refuses versions that were never tested, and mixtures that cannot be imported.

    The environment variable `OVERRIDE` turns the refusal into a warning.

    Args:
        versions: As `installed_versions` gives them. Defaults to what is installed.

    Raises:
        StackError: In one line: which version, what is tested, what to install.
    """
    problem = find_problem(installed_versions() if versions is None else versions)
    if problem is None:
        return
    if os.environ.get(OVERRIDE) == '1':
        warnings.warn(f'{problem} (goes on: {OVERRIDE}=1)', stacklevel=2)
        return
    raise StackError(f'{problem}; or set {OVERRIDE}=1 to try it all the same')


def find_problem(versions: Mapping[str, str]) -> str | None:
    """What is wrong with versions as `installed_versions` gives them; ``None`` if nothing is."""
    for name, (first, last) in TESTED.items():
        if name in versions and not _within(versions[name], first, last):
            return (
                f'{name} {versions[name]} is outside of the tested range, {first} to {last}: '
                f'{_how_to_install(name, first, last)}'
            )
    torch = versions.get('torch')
    wanted = versions.get('torchvision wants torch', '')
    if torch is not None and not SpecifierSet(wanted).contains(torch, prereleases=True):
        return (
            f'torchvision {versions["torchvision"]} is made for torch{wanted} and fails with '
            f'torch {torch}: pip install --upgrade torch=={Version(torch).public} torchvision'
        )
    for name, since, other, enough, effect in _TOGETHER:
        if name not in versions or other not in versions:
            continue
        is_new = _release(versions[name]) >= _release(since)
        if is_new and _release(versions[other]) < _release(enough):
            return (
                f'{other} {versions[other]} {effect} {name} {versions[name]}: '
                f'pip install "{other}>={enough}"'
            )
    return None


def _how_to_install(name: str, first: str, last: str) -> str:
    if name == 'python':
        return 'make the environment with one of these'
    release = _release(last)
    beyond = '.'.join(map(str, (*release[:-1], release[-1] + 1)))
    return f'make setup, or pip install "{name}>={first},<{beyond}"'


def _within(version: str, first: str, last: str) -> bool:
    """Whether ``first <= version``, and it is of the series ``last`` or of one before."""
    release = _release(version)
    return _release(first) <= release and release[: len(_release(last))] <= _release(last)


def _release(version: str) -> tuple[int, ...]:
    """The numbers alone: ``(2, 5, 1)`` of ``2.5.1+cu124`` and of ``2.5.1rc2``."""
    return Version(version).release
