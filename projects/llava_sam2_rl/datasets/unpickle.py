"""Reading a pickle that may come from anywhere, without letting it run anything."""

from __future__ import annotations

import builtins
import pickle
from pathlib import Path
from typing import Any, BinaryIO

_BUILTINS = frozenset({'complex', 'frozenset', 'set'})


def _bytearray(*given: Any) -> bytearray:
    # Made of bytes, or of text by protocols 0 to 2. A number would ask for that much memory.
    if len(given) == 2 and isinstance(given[0], str):
        return bytearray(_bytes_from_text(given[0], given[1].replace('-', '')))
    if len(given) > 1 or not all(isinstance(value, bytes) for value in given):
        raise pickle.UnpicklingError('a bytearray that is not made of bytes')
    return bytearray(*given)


def _bytes_from_text(text: str, encoding: str = 'latin1') -> bytes:
    # How protocols 0 to 2 write bytes; the real codecs.encode would take any codec.
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'bytes written with the codec {encoding!r}')
    return text.encode('latin1')


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ('builtins', '__builtin__') and name in _BUILTINS:
            return getattr(builtins, name)
        if module in ('builtins', '__builtin__') and name == 'bytearray':
            return _bytearray
        if (module, name) == ('_codecs', 'encode'):
            return _bytes_from_text
        raise pickle.UnpicklingError(
            f'refuses to load {module}.{name}: only containers, strings and numbers are read'
        )


def load_plain_pickle(source: str | Path | BinaryIO) -> Any:
    """Reads a pickle of builtin containers, strings, bytes and numbers.

    Strings of a Python 2 pickle are decoded as UTF-8.

    Args:
        source: Path or open binary file.

    Raises:
        pickle.UnpicklingError: The pickle names anything else, which is not imported or called,
            or it is broken; the message names the file.
    """
    if isinstance(source, (str, Path)):
        with open(source, 'rb') as file:
            return load_plain_pickle(file)
    name = getattr(source, 'name', 'pickle')
    try:
        return _PlainUnpickler(source, encoding='utf-8', errors='replace').load()
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(f'{name}: {error}') from error
    except (EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise pickle.UnpicklingError(f'{name}: broken pickle: {error}') from error
