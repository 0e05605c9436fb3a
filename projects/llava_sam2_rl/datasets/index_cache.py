"""Index arrays that are built once and then opened as memory maps by every worker and rank."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock, Timeout
from mmengine.logging import print_log

#: Folder of the caches beside the files they index.
FOLDER = '.index_cache'
#: After so many seconds a process stops waiting for the one that builds, and builds itself.
LOCK_TIMEOUT = 900.0
#: Part of every key: raise it when the files' layout changes.
_LAYOUT = 1

_fallbacks_told: set[Path] = set()


class CachedIndex(dict[str, np.ndarray]):
    """Read-only memory-mapped arrays by name. Travels to a spawned worker as its path."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_open(folder))
        self.folder = folder

    def __reduce__(self) -> tuple:
        return CachedIndex, (self.folder,)


def cached_index(
    sources: Sequence[Path],
    build: Callable[[], dict[str, np.ndarray]],
    name: str,
    cache_dir: Path | str | None = None,
    version: int = 1,
) -> CachedIndex:
    """The arrays that ``build`` makes of ``sources``, built only when a source has changed.

    The key is the name, size and modification time of every source, with ``version``. An entry is
    a folder of ``.npy`` files that appears whole, by a rename; whoever else is about to build the
    same one waits for it. The lock is the operating system's, so a crash leaves none behind.

    Args:
        sources: Files that the arrays are made of. They are only looked at here (``stat``).
        build: Makes the arrays: no objects, no absolute paths (the folder may be moved).
        name: Names the index and, together with ``version``, its builder and options.
        cache_dir: Folder of the cache; by default ``.index_cache`` beside the first source, or
            ``~/.cache/llava_sam2_rl`` where that cannot be written (said once in the log).
        version: To be raised when ``build`` changes its mind about the same files.

    Raises:
        FileNotFoundError: A source is not there.
        OSError: No folder can be written.
        RuntimeError: A source changed while it was read.
        ValueError: There are no sources, or ``build`` made an array of objects.
    """
    if not sources:
        raise ValueError(f'{name}: an index needs at least one source file')
    sources = [Path(source) for source in sources]
    key = _key(sources, name, version)
    entry_name = f'{name}-{key[:24]}'
    folders = [Path(cache_dir)] if cache_dir is not None else _default_folders(sources[0].parent)

    for folder in folders:
        index = _opened(folder / entry_name)
        if index is not None:
            return index
    folder = _writable(folders)
    entry = folder / entry_name
    try:
        with FileLock(folder / f'{entry_name}.lock', timeout=LOCK_TIMEOUT):
            return _opened(entry) or _built(entry, build, sources, key, name, version)
    except Timeout:
        print_log(
            f'{name}: no index after {LOCK_TIMEOUT:.0f} s of waiting for another process; '
            'building it here too',
            logger='current',
            level=logging.WARNING,
        )
    except NotImplementedError:
        pass  # A file system without locks: several may build, the first to finish is kept.
    return _opened(entry) or _built(entry, build, sources, key, name, version)


def _key(sources: Iterable[Path], name: str, version: int) -> str:
    digest = hashlib.sha256(json.dumps([_LAYOUT, name, version]).encode())
    base = None
    for source in sources:
        base = source.parent if base is None else base
        stat = source.stat()
        row = [os.path.relpath(source, base), stat.st_size, stat.st_mtime_ns]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _default_folders(beside: Path) -> list[Path]:
    return [beside / FOLDER, Path.home() / '.cache' / 'llava_sam2_rl']


def _writable(folders: Sequence[Path]) -> Path:
    errors = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            errors.append(f'{folder}: {error}')
            continue
        if errors and folder not in _fallbacks_told:
            _fallbacks_told.add(folder)
            print_log(
                f'index caches go to {folder}, since {folders[0]} cannot be written',
                logger='current',
            )
        return folder
    raise OSError(
        f'no folder for an index cache ({"; ".join(errors)}): give one that can be written as '
        'cache_dir'
    )


def _open(entry: Path) -> dict[str, np.ndarray]:
    shapes = json.loads((entry / 'shapes.json').read_text(encoding='utf-8'))
    arrays = {}
    for name, shape in shapes.items():
        # Nothing cannot be mapped.
        mode: Literal['r'] | None = None if 0 in shape else 'r'
        array = np.load(entry / f'{name}.npy', mmap_mode=mode, allow_pickle=False)
        if list(array.shape) != shape:
            raise ValueError(f'{name}.npy is {array.shape}, expected {tuple(shape)}')
        # A plain view: numpy's memmap class slows every single access down.
        arrays[name] = array.view(np.ndarray)
    return arrays


def _opened(entry: Path) -> CachedIndex | None:
    """The entry, or ``None`` where there is none, or only a damaged one."""
    if not entry.is_dir():
        return None
    try:
        return CachedIndex(entry)
    except (OSError, ValueError) as error:
        print_log(
            f'the index cache {entry} is damaged ({error}) and will be built anew',
            logger='current',
            level=logging.WARNING,
        )
        return None


def _built(
    entry: Path,
    build: Callable[[], dict[str, np.ndarray]],
    sources: Sequence[Path],
    key: str,
    name: str,
    version: int,
) -> CachedIndex:
    print_log(f'{name}: indexing {len(sources)} file(s), kept in {entry}', logger='current')
    started = time.monotonic()
    arrays = build()
    if _key(sources, name, version) != key:
        raise RuntimeError(f'{name}: a source file changed while it was indexed; start again')
    made = Path(tempfile.mkdtemp(prefix=f'{entry.name}.tmp', dir=entry.parent))
    try:
        # mkdtemp is private to the user; the cache is as open as the folder it lies in.
        made.chmod(entry.parent.stat().st_mode & 0o777)
        for array_name, array in arrays.items():
            with open(made / f'{array_name}.npy', 'wb') as file:
                np.save(file, np.ascontiguousarray(array), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        shapes = {array_name: np.shape(array) for array_name, array in arrays.items()}
        (made / 'shapes.json').write_text(json.dumps(shapes), encoding='utf-8')
        _move(made, entry)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    print_log(f'{name}: indexed in {time.monotonic() - started:.1f} s', logger='current')
    return CachedIndex(entry)


def _move(made: Path, entry: Path) -> None:
    """Puts a whole entry in place; a whole one of another process stays, a damaged one goes."""
    try:
        os.rename(made, entry)
        return
    except OSError:
        if not entry.is_dir():
            raise
    try:
        CachedIndex(entry)
    except (OSError, ValueError):
        # Moved away rather than emptied, so that nobody meets half an entry.
        away = Path(tempfile.mkdtemp(prefix=f'{entry.name}.old', dir=entry.parent))
        os.rename(entry, away / 'entry')
        shutil.rmtree(away, ignore_errors=True)
        os.rename(made, entry)
