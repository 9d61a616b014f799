"""Errors for people. Each says what was given, what is accepted and what to type next.

Every class is also the built-in exception a caller would expect, so either may be caught.
"""

from __future__ import annotations


class CascadeError(Exception):
    """Base of every error that cascade-rt raises on purpose."""


class RequestError(CascadeError, ValueError):
    """The request was wrong: a size, a scale, a name or a type that is not accepted."""


class CheckpointError(CascadeError, ValueError):
    """A checkpoint is missing, damaged, of another architecture, or of a kind that is not read."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given place, or it is of a kind that is never read."""


class BundleError(CascadeError, ValueError):
    """A bundle is damaged, of a newer format, or lacks an engine."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """There is no bundle at the given place."""


class EngineError(CascadeError, RuntimeError):
    """An engine could not be loaded or run, or was called with tensors that it does not take."""


class ExportError(CascadeError, RuntimeError):
    """An export could not be finished, or what came out differs from PyTorch."""


class OutputError(CascadeError, OSError):
    """A result could not be written: no permission, no room, or something is in the way."""
