"""Errors that tell a user what to change."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another model; the message names file and fix."""
