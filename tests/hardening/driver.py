"""Commands as a user types them, in this process or in one of their own, and what every refusal must look like."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEW_SECONDS = 30.0
"""Refusals take milliseconds; the bound is that of a machine with many other things to do."""
LONGEST_LINE = 900

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a command told.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        out: standard output.
        err: standard error.
        seconds: how long it took.
    """

    code: int
    out: str
    err: str
    seconds: float


def typed(main: Main, *arguments: object) -> Told:
    """A command in this process. What it raises, beside the parser's own exit, is raised."""
    out, err = io.StringIO(), io.StringIO()
    started = time.monotonic()
    shower = warnings.showwarning
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    finally:
        warnings.showwarning = shower  # a command shows warnings in its own way
    return Told(code=code, out=out.getvalue(), err=err.getvalue(), seconds=time.monotonic() - started)


SOURCES = {
    "cascade-run": "from cascade_rt.entry import main_run as main",
    "cascade-info": "from cascade_rt.entry import main_info as main",
    "cascade-export": "from cascade_export.cli import main",
}


def words_of(command: str, *arguments: object, flags: Sequence[str] = ()) -> list[str]:
    """A command of its own as words for `subprocess`; ``flags`` are those of Python."""
    code = f"import sys; {SOURCES[command]}; sys.exit(main())"
    return [sys.executable, *flags, "-c", code, *map(str, arguments)]


def apart(
    words: Sequence[str],
    *,
    shell: str = "exec",
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    timeout: float = 120,
    **more: Any,
) -> Told:
    """A command in a process of its own, through a shell.

    Args:
        words: from `words_of`.
        shell: what stands before the words, for example ``ulimit -v 1000; exec``; ``@`` stands for the words where
            something must follow them.
        cwd: working folder.
        env: changes of the environment; None: not set.
        timeout: seconds after which the command counts as hanging.
        more: arguments of `subprocess.run`.
    """
    line = shell.replace("@", '"$@"') if "@" in shell else f'{shell} "$@"'
    environment = {**os.environ, **{k: v for k, v in (env or {}).items() if v is not None}}
    for name in (k for k, v in (env or {}).items() if v is None):
        environment.pop(name, None)
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", line, "bash", *words],
        capture_output=True,
        cwd=cwd,
        env=environment,
        timeout=timeout,
        check=False,
        **more,
    )
    out, err = done.stdout.decode(errors="surrogateescape"), done.stderr.decode(errors="surrogateescape")
    return Told(code=done.returncode, out=out, err=err, seconds=time.monotonic() - started)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder, hidden files too; links as where they lead to."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder" if path.is_dir() else "something else"
    return found


def check_line(told: Told, *named: str, code: int | None = None) -> str:
    """Refuse anything but one line that names what is wrong, and an exit code of 1 or 2; returns the line."""
    assert "Traceback" not in told.err, told.err
    assert told.code == code if code is not None else told.code in (1, 2), told
    assert told.out == "", told.out
    assert told.err.startswith("error: "), told.err
    assert told.err.endswith("\n"), told.err
    line = told.err[:-1]
    assert line.isprintable(), repr(line)  # no line break, no escape sequence of a terminal
    assert len(line) < LONGEST_LINE, len(line)
    for name in named:
        assert name in line, f"{name!r} is not named: {line}"
    assert told.seconds < FEW_SECONDS, told.seconds
    return line
