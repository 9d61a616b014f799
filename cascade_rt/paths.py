"""Where files of this user lie."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path

from .files import name_of, said_by


def cache_dir() -> Path:
    """Where what can be computed again is kept between runs; it need not exist yet.

    Raises:
        OSError: this user has no home folder.
    """
    windows = sys.platform == "win32"
    base = os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME")
    if base and os.path.isabs(base):  # noqa: PTH117 - a relative one is ignored, as the XDG specification says
        return Path(base) / "cascade-rt"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(f"{error}; set HOME or XDG_CACHE_HOME") from None
    return home / ("AppData/Local" if windows else ".cache") / "cascade-rt"


def cache_folder(name: str) -> Path | None:
    """A folder of the cache, made if it is not there; None where that cannot be done, of which a warning tells once.

    Args:
        name: of the folder, with ``/`` between its parts.
    """
    try:
        folder = cache_dir() / name
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "no permission to write", str(folder))
    except OSError as error:
        _warn_once(os.environ.get("XDG_CACHE_HOME") or "~/.cache", said_by(error))
        return None
    return folder


@functools.cache
def _warn_once(base: str, reason: str) -> None:
    warnings.warn(
        f"nothing can be kept between runs below {name_of(base)}: {reason}; what is built is built again every time. "
        "Set XDG_CACHE_HOME to a folder that can be written",
        RuntimeWarning,
        stacklevel=3,
    )
