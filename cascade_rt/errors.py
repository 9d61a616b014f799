"""Errors for people. Each says what was given, what is accepted and what to type next.

Every class is also the built-in exception a caller would expect, so either may be caught. An error of one value carries
it as ``field``, ``value`` and ``accepted``, so that a command, an HTTP service or a C++ program can say it in its own
words.
"""

from __future__ import annotations

from typing import Any

QUOTED_CHARACTERS = 80


def shown(value: Any) -> str:
    """A value as a message may quote it: at most 80 characters, on one line, without control characters.

    A file name or a prompt may hold the escape sequences of a terminal, and an integer may have 5,000 digits, which
    Python refuses to print.
    """
    try:
        text = repr(value)
    except Exception as error:  # a caller's own class may raise anything here; Python's own limit is a ValueError
        text = f"<{type(value).__name__} that cannot be printed: {type(error).__name__}>"
    return shortened(plain(text))


def plain(text: str) -> str:
    """A text on one line whose control characters and lone surrogates are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(text: str, limit: int = QUOTED_CHARACTERS) -> str:
    """A text with its middle left out where it has more than ``limit`` characters."""
    if len(text) <= limit:
        return text
    kept = (limit - 5) // 2
    return f"{text[:kept]} ... {text[-kept:]}"


class CascadeError(Exception):
    """Base of every error that cascade-rt raises on purpose.

    Attributes:
        field: what was wrong, in the words of `Request` or of the manifest (``prior.guidance_scale``); None where the
            error is not about one value.
        value: what was given.
        accepted: what would have been taken.
    """

    def __init__(
        self, message: str = "", *, field: str | None = None, value: Any = None, accepted: str | None = None
    ) -> None:
        super().__init__(message)
        self.field, self.value, self.accepted = field, value, accepted


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


class GenerationInterrupted(CascadeError):  # noqa: N818 - it is what the caller wanted, and no fault
    """A request was stopped between two steps because somebody asked for it."""


def refused(field: str, value: Any, accepted: str) -> RequestError:
    """The error of a value that is not accepted."""
    return RequestError(
        f"{field} {shown(value)} is not accepted; it must be {accepted}", field=field, value=value, accepted=accepted
    )
