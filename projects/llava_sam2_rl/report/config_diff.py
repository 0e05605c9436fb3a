"""How a run's config differs from what it is based on, key by key."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

#: Set by the launcher of every run, and true of none in particular.
_OF_THE_LAUNCHER = ('work_dir', 'launcher', 'resume', 'load_from', 'experiment_name')
_NOTHING = object()


def config_rows(config: Config) -> list[dict[str, str | None]]:
    """What the config file changes in its bases, and the command line in the config file.

    Args:
        config: Of the run; its ``filename`` names the config file, which is read again.

    Returns:
        For every key whose value differs, in order: ``key`` (dotted), and ``base``, ``file`` and
        ``run`` as text, ``None`` where the key is absent.
    """
    run = flatten(config.to_dict())
    given = run if config.filename is None else flatten(Config.fromfile(config.filename).to_dict())
    base = {} if config.filename is None else _bases(Path(config.filename))
    return diff(base, given, run)


def diff(
    base: Mapping[str, Any], given: Mapping[str, Any], run: Mapping[str, Any]
) -> list[dict[str, str | None]]:
    """Rows of :func:`config_rows`, of three flat configs."""
    rows: list[dict[str, str | None]] = []
    for key in dict.fromkeys([*base, *given, *run]):
        values = [part.get(key, _NOTHING) for part in (base, given, run)]
        # `repr`, since True == 1 and nan != nan.
        texts = [None if value is _NOTHING else repr(value) for value in values]
        if key.split('.')[0] not in _OF_THE_LAUNCHER and len(set(texts)) > 1:
            rows.append({'key': key, **dict(zip(('base', 'file', 'run'), texts, strict=True))})
    return rows


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
