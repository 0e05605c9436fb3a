"""How a run's config differs from what it is based on, key by key."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

#: Set by the launcher of every run, and true of none in particular.
_LAUNCHER = ('work_dir', 'launcher', 'resume', 'load_from', 'experiment_name')


def config_changes(config: Config) -> dict[str, list[str]]:
    """What the config file changes in its bases, and the command line in the config file.

    Args:
        config: Of the run; its ``filename`` names the config file, which is read again.

    Returns:
        ``file`` and ``run``: lines of :func:`diff`.
    """
    run = flatten(config.to_dict())
    given = run if config.filename is None else flatten(Config.fromfile(config.filename).to_dict())
    base = {} if config.filename is None else _bases(Path(config.filename))
    return {'file': diff(base, given), 'run': diff(given, run)}


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``-key = old`` and ``+key = new`` of every key that differs in two flat configs."""
    # As text, since True == 1 and nan != nan.
    before, after = (
        sorted(
            f'{key} = {value!r}'
            for key, value in flat.items()
            if key.split('.')[0] not in _LAUNCHER
        )
        for flat in (old, new)
    )
    changes = [
        line
        for line in difflib.unified_diff(before, after, n=0)
        if not line.startswith(('---', '+++', '@@'))
    ]
    # Of neighbours that all differ, the old value of each beside its new one.
    return sorted(changes, key=lambda line: line[1:].partition(' = ')[0])


def flatten(value: Any, prefix: str = '') -> dict[str, Any]:
    """Nested dicts and lists as dotted keys: ``{'a': [{'b': 1}]}`` -> ``{'a.0.b': 1}``."""
    if isinstance(value, Mapping):
        items = list(value.items())
    # A list of plain values reads better in one piece.
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    if not items and prefix:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat.update(flatten(inner, f'{prefix}.{key}' if prefix else str(key)))
    return flat


def _bases(path: Path) -> dict[str, Any]:
    """The files that a config reads by ``read_base`` or ``_base_``, together."""
    merged: dict[str, Any] = {}
    for base in base_files(path):
        merged.update(Config.fromfile(base).to_dict())
    return flatten(merged)


def base_files(path: Path) -> list[Path]:
    """Paths of the config files a config file is directly based on."""
    if path.suffix != '.py':
        return []
    found = []
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.With):
            for statement in node.body:
                if isinstance(statement, ast.ImportFrom) and statement.module and statement.level:
                    folder = path.parents[statement.level - 1]
                    found.append(folder / f'{statement.module.replace(".", "/")}.py')
        elif isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == '_base_' for target in node.targets
        ):
            names = ast.literal_eval(node.value)
            names = [names] if isinstance(names, str) else names
            # `mmdet::…` names a config of another package.
            found += [path.parent / name for name in names if '::' not in name]
    return found
