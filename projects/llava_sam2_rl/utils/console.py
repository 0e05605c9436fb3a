"""What other packages say while a command starts: kept for the run's log, off the terminal.

bitsandbytes misses a package that nobody asked for, DeepSpeed looks for an accelerator,
transformers advises on a model that is still being built. A user can act on none of it, and the
line that matters is lost below. Errors stay, and so do the warnings of a user's own code.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

#: Loggers whose lines are the run's own.
_OWN = ('mmengine', 'projects', '__main__')
# What mmengine warns of in every run: its own use of names that it deprecates, and class names of
# data sets, which regions in words have none of.
_MMENGINES = (
    'has no metainfo',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
)


class OtherPackages(logging.Handler):
    """Takes the lines of other packages; hands them to a run's log file once there is one.

    Errors go to standard error as well, and so do warnings of the user's code, which is not
    installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[logging.LogRecord] = []
        self._log: logging.Logger | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps or writes one line."""
        own = bool(record.pathname) and not _is_installed(record.pathname)
        if record.levelno >= logging.ERROR or (own and record.levelno >= logging.WARNING):
            print(f'{record.name}: {record.getMessage()}', file=sys.stderr)
        if self._log is None:
            self._waiting.append(record)
            return
        # Asked anew for each line: whoever closes the log takes its files off the logger.
        for file in _files(self._log):
            file.handle(record)

    def keep(self) -> None:
        """Keeps what comes for the log of a run that is to start; one before it has its own."""
        self._log = None

    def write_to(self, logger: logging.Logger) -> None:
        """Writes what was kept, and all that comes, to a logger's files; rank 0 alone has some."""
        self._log = logger
        for handler in logger.handlers:
            if handler not in _files(logger):
                handler.addFilter(_is_news)
        waiting, self._waiting = self._waiting, []
        for record in waiting:
            self.emit(record)

    def say(self, name: str, text: str, level: int = logging.WARNING) -> None:
        """Takes a line that no logger made."""
        self.handle(logging.LogRecord(name, level, '', 0, text, None, None))


def _files(logger: logging.Logger) -> list[logging.FileHandler]:
    return [one for one in logger.handlers if isinstance(one, logging.FileHandler)]


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _MMENGINES)


@contextlib.contextmanager
def others_are_quiet() -> Iterator[OtherPackages]:
    """The scope in which a command imports what it needs; the loggers stay as it leaves them.

    What is printed inside is kept; where an import fails it is printed after all. From its end on
    the loggers of other packages write to `OtherPackages` instead of the terminal, and so do the
    warnings of installed packages. No garbage is looked for inside, nor later among what the
    imports made: nearly all of it stays, and to look through it took a seventh of a start.

    Yields:
        The handler, for `OtherPackages.write_to`.
    """
    there = (one for one in logging.root.handlers if isinstance(one, OtherPackages))
    handler = next(there, None) or OtherPackages()
    handler.keep()
    said = io.StringIO()
    streams = (sys.stdout, sys.stderr)
    collects = gc.isenabled()
    gc.disable()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield handler
    except ImportError:
        print(said.getvalue(), end='', file=sys.stderr)
        raise
    finally:
        if collects:
            if not gc.get_freeze_count():  # in a later scope there is more than what imports made
                gc.freeze()
            gc.enable()
        _redirect(handler, said, streams)
    for line in said.getvalue().splitlines():
        handler.say('start', line)


def _redirect(handler: OtherPackages, said: io.StringIO, streams: tuple[TextIO, TextIO]) -> None:
    """Has every logger of another package write to ``handler``."""
    loggers = logging.root.manager.loggerDict.items()
    for name, logger in [('', logging.root), *loggers]:
        if not isinstance(logger, logging.Logger) or name.partition('.')[0] in _OWN:
            continue
        for one in list(logger.handlers):
            stream = getattr(one, 'stream', None)
            if isinstance(one, logging.FileHandler) or stream not in (said, *streams):
                continue
            logger.removeHandler(one)
            if handler not in logger.handlers:
                logger.addHandler(handler)
    # The rest propagates to the root; without a handler there Python prints it.
    if handler not in logging.root.handlers:
        logging.root.addHandler(handler)
    for name in _OWN:
        logging.getLogger(name).propagate = False
    show = warnings.showwarning

    def show_own(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if file is None and _is_installed(filename):
            handler.say('py.warnings', f'{filename}:{lineno}: {category.__name__}: {message}')
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_own


def _is_installed(filename: str) -> bool:
    """Whether a file is of a package that pip put there, or of Python, and not of this one."""
    path = Path(filename)
    if path.is_relative_to(Path(__file__).resolve().parents[1]):
        return False
    return 'site-packages' in path.parts or path.is_relative_to(sys.base_prefix)
