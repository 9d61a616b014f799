"""The environment that every timed process is given, and the command that another checkout's code is run by."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from cascade_rt.errors import RequestError
from cascade_rt.files import name_of

SOURCES = ("", "export", "engines/tiny", "benchmarks")
"""Folders of a checkout that Python imports from."""


def environment(threads: int, checkout: Path | None = None) -> dict[str, str]:
    """The environment variables of a timed process.

    Python may write its compiled modules, also where this process was told not to: a user's second start finds them.

    Args:
        threads: within an operator.
        checkout: whose code it imports; None is what is installed. Such a process must not be started in a folder that
            holds other code.
    """
    made = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    made.pop("PYTHONDONTWRITEBYTECODE", None)
    if checkout is not None:
        made["PYTHONPATH"] = os.pathsep.join(str(checkout / source) for source in SOURCES)
    return made


def run_command(checkout: Path) -> list[str]:
    """The command line that starts a checkout's ``cascade-run``.

    Raises:
        RequestError: it is no checkout of this project.
    """
    project = checkout / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    found = re.search(r'^cascade-run = "([\w.]+):(\w+)"$', text, re.MULTILINE)
    if found is None:
        raise RequestError(f"{name_of(checkout)} is no checkout of cascade-rt: its pyproject.toml names no cascade-run")
    return [sys.executable, "-c", f"from {found[1]} import {found[2]}; raise SystemExit({found[2]}())"]
