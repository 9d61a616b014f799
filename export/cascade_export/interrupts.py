"""Work that no interrupt may pass through."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
STACK_BYTES = 64 << 20
"""Of the thread: tracing a network recurses deeply, and a thread may have less than the main one."""


def uninterrupted(work: Callable[[], T]) -> T:
    """Do work in a thread of its own, so that Ctrl-C is raised here, where it is waited for, and not within the work.

    Python raises an interrupt in the main thread wherever that is. While torch traces a network that may be in Python
    code called by C++ through which no exception can pass: the process aborts, and leaves behind what it was writing.

    Args:
        work: it goes on after an interrupt, unseen, until it is done or the process ends. It must not write files.

    Returns:
        What the work returns; what it raises is raised here.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()  # not Thread.is_alive: an interrupted join may take a running thread for ended

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    before = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="cascade-trace", daemon=True)
        thread.start()
    finally:
        threading.stack_size(before)
    try:
        while not done.wait(0.2):  # in slices: some systems do not interrupt a wait without an end
            pass
    except BaseException:
        atexit.register(_end_with, done)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _end_with(done: threading.Event) -> None:
    """End the process of an interrupted command at once if its work still goes on.

    Python would stop the thread where it next runs Python code, which aborts the process in the same way.
    """
    if not done.is_set():
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(1)
