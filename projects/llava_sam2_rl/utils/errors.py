"""Errors that tell a user what to change."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another model; the message names file and fix."""


class StackError(RuntimeError):
    """Installed versions that do not work, or not together; the message names them and the fix.

    No `ImportError`, though it is raised at an import: mmengine's ``custom_imports`` replaces the
    text of those by the name of the module.
    """


#: What mmengine raises for a config that it cannot read, or an override of what is not there.
CONFIG_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    SyntaxError,
    ImportError,
    LookupError,
    TypeError,
    AttributeError,
)
