"""What all commands share: exit codes, one line for an error, a clean stop on Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from .errors import BundleNotFoundError, CascadeError, MissingCheckpointError, RequestError

DONE, FAILED, WRONG_REQUEST = 0, 1, 2
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
        raise RequestError(f"{message}; see {self.prog} --help")


def run_command(command: Callable[[], None]) -> int:
    """Run a command and turn what it raises into an exit code and one line on standard error.

    Returns:
        0 done, 1 the work failed, 2 the request was wrong.
    """
    global _interrupted  # noqa: PLW0603 - a process has one pair of signal handlers
    _interrupted = False
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    unraisable, sys.unraisablehook = sys.unraisablehook, _quiet_interrupts
    try:
        command()
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, FAILED)
    except Exception as error:
        # an interrupt in the middle of an import comes out as whatever the import makes of it
        return _fail(INTERRUPTED, FAILED) if _interrupted else _report(error)
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)
    return DONE


def _report(error: Exception) -> int:
    """One line and the exit code for an error; what is not expected goes on as it is."""
    if isinstance(error, RequestError | BundleNotFoundError | MissingCheckpointError):
        return _fail(str(error), WRONG_REQUEST)
    if isinstance(error, CascadeError):
        return _fail(str(error), FAILED)
    if isinstance(error, MemoryError):
        return _fail("there is not enough memory for this", FAILED)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()  # the reader of our output has gone, and no message would reach it
        return FAILED
    if isinstance(error, OSError):
        return _fail(f"the system refused: {error.strerror or error}", FAILED)
    raise error


def _quiet_interrupts(unraisable: Any) -> None:
    """Python prints what it cannot raise; an interrupt is reported by the command itself."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def main_run(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cascade-run``; returns the exit code."""

    def command() -> None:
        from . import cli  # inside, so that Ctrl-C is one line while NumPy is still loading

        cli.generate(cli.run_parser().parse_args(argv))
        sys.stdout.flush()

    return run_command(command)


def main_info(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cascade-info``; returns the exit code."""

    def command() -> None:
        from . import cli

        cli.show(cli.info_parser().parse_args(argv))
        sys.stdout.flush()

    return run_command(command)


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


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code
