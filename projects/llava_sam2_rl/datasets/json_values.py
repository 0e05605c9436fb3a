"""The values of a large JSON object, one at a time, and where they lie in the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK = 1 << 24
_SPACE = ' \t\r\n'


def iterate_object(path: Path, chunk: int = _CHUNK) -> Iterator[tuple[str, Any, int, int]]:
    """The members of the object that a JSON file holds, in its order.

    Only one chunk of the file, or one value where that is longer, is in memory at a time.

    Yields:
        ``(key, value, start, length)``, the value's place in the file in bytes. Strings in
        ``value`` are decoded byte by byte (Latin-1); read it again with :func:`read_value` for
        text beyond ASCII.

    Raises:
        ValueError: The file is no JSON object; the message names the place.
    """
    decoder = json.JSONDecoder()
    with open(path, encoding='latin-1', newline='') as file:
        # One character per byte, so that places in the text are places in the file.
        text, base, at, finished = '', 0, 0, False

        def more() -> None:
            nonlocal text, base, at, finished
            added = file.read(max(chunk, len(text) - at))
            finished = not added
            text, base, at = text[at:] + added, base + at, 0

        def wrong(what: str) -> ValueError:
            return ValueError(f'{path} is no JSON object: {what} at byte {base + at}')

        def peek() -> str:
            nonlocal at
            while True:
                while at < len(text) and text[at] in _SPACE:
                    at += 1
                if at < len(text):
                    return text[at]
                if finished:
                    raise wrong('the file ends')
                more()

        def take(wanted: str) -> str:
            nonlocal at
            found = peek()
            if found not in wanted:
                raise wrong(f'{found!r} where one of {wanted!r} should be')
            at += 1
            return found

        def decode() -> tuple[Any, int, int]:
            nonlocal at
            peek()
            while True:
                try:
                    value, end = decoder.raw_decode(text, at)
                    # A number may go on in the next chunk.
                    if end < len(text) or finished:
                        place = (base + at, end - at)
                        at = end
                        return value, *place
                except (json.JSONDecodeError, RecursionError) as error:
                    if finished or isinstance(error, RecursionError):
                        raise wrong(str(error)) from error
                more()

        peek()
        if text.startswith('\xef\xbb\xbf'):  # A byte order mark.
            at = 3
        take('{')
        if peek() == '}':
            return
        while True:
            key, _, length = decode()
            if not isinstance(key, str):
                raise wrong(f'the key {key!r:.40}')
            raw = text[at - length : at].encode('latin-1')
            take(':')
            yield json.loads(raw.decode('utf-8', 'replace')), *decode()
            if take(',}') == '}':
                return


def read_value(path: Path, start: int, length: int) -> Any:
    """A value at the place that :func:`iterate_object` gave.

    Raises:
        ValueError: There is no JSON value.
        OSError: The file cannot be read.
    """
    with open(path, 'rb') as file:
        data = os.pread(file.fileno(), length, start)
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError(f'{path}: nested too deeply at byte {start}') from error
