"""What all commands share: exit codes, one line for an error, a clean stop on Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .errors import (
    BundleNotFoundError,
    CascadeError,
    MissingCheckpointError,
    OutputError,
    RequestError,
    plain,
    shortened,
)
from .files import name_of, said_by

DONE, FAILED, WRONG_REQUEST = 0, 1, 2
_SHARED_LIBRARY = re.compile(r"\.(so|dylib|dll|pyd)\b|DLL load failed", re.IGNORECASE)
INTERRUPTED = "interrupted; nothing half-written was left behind"


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error's."""

    def __init__(self, prog: str, description: str, examples: str) -> None:
        super().__init__(prog, description=description, epilog=examples, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            RequestError: always.
        """
        raise RequestError(f"{shortened(plain(message), 200)}; see {self.prog} --help")


def as_integer(text: str) -> int | str:
    """The ``type`` of a flag that takes an integer; what is none stays text, for a check that says what is accepted."""
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,40}", text) else text


def as_number(text: str) -> float | str:
    """The ``type`` of a flag that takes a number; see `as_integer`."""
    plainly = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?", text)
    return text if plainly is None or math.isinf(number := float(text)) else number


def as_place(text: str) -> str:
    """The ``type`` of a flag that takes the name of a file or folder: an empty one would be the current folder.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("'' is no name of a file or folder")
    return text


def as_path(text: str) -> Path:
    """The same, as a path."""
    return Path(as_place(text))


def run_command(command: Callable[[], None], names: Mapping[str, str] | None = None, ends: bool = False) -> int:
    """Run a command and turn what it raises into an exit code and one line on standard error.

    Args:
        command: what to do; it may print results to standard output.
        names: field of an error -> what the command line calls it.
        ends: the process ends with the command: what is done is not interrupted any more.

    Returns:
        0 done, 1 the work failed, 2 the request was wrong.
    """
    global _interrupted  # noqa: PLW0603 - a process has one pair of signal handlers
    _interrupted = False
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    unraisable, sys.unraisablehook = sys.unraisablehook, _quiet_interrupts
    _bear_any_text()
    try:
        command()
        _flush()
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, FAILED)
    except Exception as error:
        # an interrupt in the middle of an import comes out as whatever the import makes of it
        return _fail(INTERRUPTED, FAILED) if _interrupted else _report(error, names or {})
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ends else handler)
    return DONE


def _report(error: Exception, names: Mapping[str, str]) -> int:
    """One line and the exit code for an error; what is not expected goes on as it is."""
    if isinstance(error, RequestError | BundleNotFoundError | MissingCheckpointError):
        return _fail(worded(error, names), WRONG_REQUEST)
    if isinstance(error, CascadeError):
        return _fail(worded(error, names), FAILED)
    if isinstance(error, MemoryError):
        return _fail("there is not enough memory for this; use --low-memory, or a smaller --size", FAILED)
    if isinstance(error, ImportError) and _SHARED_LIBRARY.search(str(error)):
        cause: BaseException = error
        while (deeper := cause.__cause__ or cause.__context__) is not None:
            cause = deeper  # NumPy writes twenty lines around what the system said
        told = f"a library cannot be loaded: {shortened(plain(str(cause)), 300)}"
        return _fail(f"{told}; allow more memory (ulimit -v unlimited), or install it again with pip", FAILED)
    if isinstance(error, RecursionError):
        return _fail("the stack is too small for this; raise its limit with: ulimit -s 8192", FAILED)
    if isinstance(error, Warning):  # python -W error
        return _fail(f"a warning, which Python was told to treat as an error: {error}", FAILED)
    if isinstance(error, BrokenPipeError):
        _drop(sys.stdout)  # the reader of our output has gone, and no message would reach it
        return FAILED
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EBADF, errno.EIO):
        _drop(sys.stdout)  # it was being printed to
        return _fail(f"standard output cannot be written: {error.strerror}", FAILED)
    if isinstance(error, OSError):
        where = f" ({name_of(error.filename)})" if isinstance(error.filename, str) else ""
        return _fail(f"the system refused: {error.strerror or error}{where}", FAILED)
    raise error


def worded(error: CascadeError, names: Mapping[str, str]) -> str:
    """An error's message with fields under the names that the command line has for them.

    Its own field stands at the beginning. Other fields may stand anywhere; those that are words of English too (height)
    are left as they are.
    """
    message, field = str(error), error.field
    if field is not None:
        of_list, bracket, _ = field.partition("[")  # images[0] and images[1].weight are both of --image
        told = rf"{re.escape(of_list)}\[\d+\](\.\w+)?" if bracket else rf"{re.escape(field)}\b"
        message = re.sub(rf"^{told}", names.get(of_list, "\\g<0>"), message)
    for other, name in names.items():
        if "_" in other or "." in other:
            message = re.sub(rf"(?<![\w./]){re.escape(other)}(?![\w/]|\.\w)", name, message)
    return message


def _bear_any_text() -> None:
    """A terminal or a file that takes only some characters gets the others as escapes instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Write out what was printed, so that a full or closed standard output is noticed.

    Raises:
        OutputError: it cannot be written.
    """
    if sys.stdout is None:
        raise OutputError("standard output is closed, so that results cannot be shown; redirect it to a file instead")
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        _drop(sys.stdout)
        raise OutputError(f"standard output cannot be written: {said_by(error)}") from None


def _drop(stream: Any) -> None:
    """Send what is still in a stream's buffer to nowhere: Python would try again when it exits, and complain."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # closed already
        sys.stdout = None


def _quiet_interrupts(unraisable: Any) -> None:
    """Python prints what it cannot raise; an interrupt is reported by the command itself."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


_interrupted = False


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    global _interrupted  # noqa: PLW0603 - see `run_command`
    _interrupted = True
    raise KeyboardInterrupt


def check_interrupt() -> None:
    """Stop here if a signal came that was lost.

    Python ignores what a signal handler raises while it runs a callback of the interpreter's own (a weak reference's,
    a destructor's), and tracing a network runs thousands of those.

    Raises:
        KeyboardInterrupt: a signal came since the command began.
    """
    if _interrupted:
        raise KeyboardInterrupt


def say_aside(line: str) -> None:
    """A line on standard error, without control characters; nobody can be told where that is closed or full."""
    if sys.stderr is not None:  # `print` would take standard output instead
        with contextlib.suppress(OSError, ValueError):
            print(plain(line), file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> int:
    say_aside("error: " + re.sub(r"\s*[\r\n]\s*", " ", message.strip()))
    return code
