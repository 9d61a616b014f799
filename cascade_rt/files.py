"""Files of this machine: read with bounds, and written so that nothing half-written ever has the final name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from .errors import CascadeError, OutputError, plain, shortened

MIB = 1 << 20
E = TypeVar("E", bound=CascadeError)


def name_of(path: Path | str) -> str:
    """A path as a message may quote it."""
    text = shortened(plain(os.fspath(path)), 120)
    return text if text == text.strip() != "" else f"'{text}'"  # blanks at an end would not be seen


def read_bounded(path: Path, most: int, error: type[E]) -> bytes:
    """The bytes of a regular file of at most ``most`` bytes.

    A pipe would make the reader wait for ever, and a link to ``/dev/zero`` fill the memory.

    Raises:
        FileNotFoundError: there is no such file (also NotADirectoryError): the caller knows what that means.
        error: it is no regular file, too large, or cannot be read.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{name_of(path)} is no regular file; put the file itself there")
        if found.st_size > most:
            raise error(f"{name_of(path)} has {found.st_size} bytes; such a file has at most {most}")
        with path.open("rb") as file:
            return file.read(most + 1)[:most]
    except (FileNotFoundError, NotADirectoryError):
        raise
    except CascadeError:  # many of them are a ValueError too
        raise
    except (OSError, ValueError) as reason:  # ValueError: a name with a zero byte
        raise error(f"{name_of(path)} cannot be read: {said_by(reason)}") from None


def said_by(error: BaseException) -> str:
    """What the operating system says of an error, without the path, which may be long."""
    return (error.strerror if isinstance(error, OSError) and error.strerror else None) or plain(str(error))


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MIB):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when everything is in it; nothing stays where anything goes wrong.

    Raises:
        OutputError: the folder is missing or not writable, or there is no room.
    """
    with _temporary_beside(path) as (file, temporary):
        yield file
        _take_names([(file, temporary, path)])


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files: none of them has its name before the bytes of all are on the disk.

    Raises:
        OutputError: a folder is missing or not writable, or there is no room.
    """
    with contextlib.ExitStack() as stack:
        ready = []
        for path, content in contents.items():
            file, temporary = stack.enter_context(_temporary_beside(path))
            file.write(content)
            ready.append((file, temporary, path))
        _take_names(ready)


def check_name(path: Path) -> None:
    """Refuse a path that no system takes.

    Raises:
        OutputError: it holds a zero byte.
    """
    if "\0" in os.fspath(path):
        raise OutputError(f"{name_of(path)} cannot be written: its name holds a zero byte (null)")


@contextmanager
def _temporary_beside(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A file beside ``path``, open for writing, and removed in the end if it still has its own name.

    It is made exclusively and under a name that nobody can foresee: no link that lies there is followed, and two
    writers do not meet.
    """
    check_name(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=".cascade-", suffix=".partial", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file, temporary
    except OSError as error:
        if isinstance(error, CascadeError):
            raise
        raise OutputError(f"{name_of(path)} cannot be written: {said_by(error)}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _take_names(ready: Iterable[tuple[IO[bytes], Path, Path]]) -> None:
    """Put files on the disk and rename each from its temporary to its final path."""
    files = list(ready)
    for file, temporary, path in files:
        with _named(path):
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
    for _, _, path in files:  # nothing has its name yet: what can be foreseen must not stop half of the renaming
        if path.is_dir():
            raise OutputError(f"{name_of(path)} cannot be written: Is a directory")
    for _, temporary, path in files:
        with _named(path):
            temporary.replace(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the system as those of one file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{name_of(path)} cannot be written: {said_by(error)}") from error


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
