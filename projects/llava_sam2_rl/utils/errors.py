"""Errors that tell a user what to change."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another model; the message names file and fix."""


class StackError(RuntimeError):
    """Installed versions that do not work, or not together; the message names them and the fix.

    No `ImportError`, though it is raised at an import: mmengine's ``custom_imports`` replaces the
    text of those by the name of the module.
    """
