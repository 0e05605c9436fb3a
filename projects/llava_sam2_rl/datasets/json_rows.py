"""The objects of a JSON file, one by one: a list, or one object a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import BadRecord

_OTHER_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_bytes(path: Path) -> bytes:
    """A text file without its byte order mark.

    Raises:
        ValueError: It is UTF-16.
    """
    raw = path.read_bytes()
    if raw.startswith(_OTHER_ENCODINGS):
        raise ValueError(f'{path} is UTF-16: save it as UTF-8')
    return raw.removeprefix(codecs.BOM_UTF8)


def load_json(path: Path) -> Any:
    """What a JSON file holds. Bytes that are not UTF-8 become halves of surrogate pairs.

    Raises:
        ValueError: It is no JSON.
    """
    try:
        return json.loads(read_bytes(path).decode('utf-8', 'surrogateescape'))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON: {error}') from error


def iterate_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and text of every entry of a list, or of every line that is not blank.

    Raises:
        ValueError: The file begins with ``[``, is not called ``.jsonl`` and is no JSON list.
    """
    raw = read_bytes(path)
    if raw.lstrip()[:1] == b'[' and path.suffix.lower() != '.jsonl':
        for number, value in enumerate(load_json(path), 1):
            yield number, json.dumps(value).encode()
    else:
        for number, line in enumerate(raw.split(b'\n'), 1):
            if line.strip():
                yield number, line


def pack_rows(rows: Iterator[tuple[int, bytes]]) -> dict[str, np.ndarray]:
    """Rows as the arrays of an index.

    Returns:
        ``text`` (bytes,) uint8, one after the other; ``ends`` (N,) int64; ``numbers`` (N,) int64.
    """
    numbers, texts = [], []
    for number, text in rows:
        numbers.append(number)
        texts.append(text)
    return {
        'text': np.frombuffer(b''.join(texts), np.uint8),
        'ends': np.cumsum([len(text) for text in texts], dtype=np.int64),
        'numbers': np.array(numbers, np.int64),
    }


class JSONRows:
    """Rows of an index, parsed when they are read.

    Args:
        index: What `pack_rows` made.
    """

    def __init__(self, index: Mapping[str, np.ndarray]) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index['ends'])

    def number(self, row: int) -> int:
        """The number that the row was packed with."""
        return int(self._index['numbers'][row])

    def read(self, row: int, record: str) -> dict[str, Any]:
        """The object in a row.

        Raises:
            BadRecord: ``bad_encoding``, ``bad_json``.
        """
        start = int(self._index['ends'][row - 1]) if row else 0
        raw = self._index['text'][start : int(self._index['ends'][row])].tobytes()
        try:
            value = json.loads(raw.decode('utf-8'))
        except UnicodeDecodeError as error:
            raise BadRecord('bad_encoding', record, f'not UTF-8: {error}') from error
        except (ValueError, RecursionError) as error:
            raise BadRecord('bad_json', record, str(error)) from error
        if not isinstance(value, dict):
            raise BadRecord('bad_json', record, f'a {type(value).__name__}, expected an object')
        return value
