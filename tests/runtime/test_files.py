"""Files are read with bounds, and written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

import cascade_rt.files
from cascade_rt import BundleError, OutputError, RequestError
from cascade_rt.files import name_of, read_bounded, said_by, sha256_of, write_together, written_whole

posix = pytest.mark.skipif(os.name != "posix", reason="pipes, devices, links and modes are those of POSIX")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- reading ----------------------------------------------------------------------------------------------------------


def test_what_is_within_the_bound_is_read(tmp_path: Path) -> None:
    place = tmp_path / "x"
    place.write_bytes(b"12345")
    assert read_bounded(place, 5, BundleError) == b"12345"
    with pytest.raises(BundleError, match=r"x has 5 bytes; such a file has at most 4"):
        read_bounded(place, 4, BundleError)
    link = tmp_path / "link"
    link.symlink_to(place)
    assert read_bounded(link, 5, BundleError) == b"12345"


@posix
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    """A pipe would make the reader wait for ever; a device would fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    server = socket.socket(socket.AF_UNIX)
    short = os.open(tmp_path, os.O_RDONLY)  # a socket's name has at most 107 bytes
    server.bind(f"/proc/self/fd/{short}/socket")
    try:
        for name in ("pipe", "device", "folder", "socket"):
            with pytest.raises(RequestError, match=rf"{name} is no regular file; put the file itself there"):
                read_bounded(tmp_path / name, 100, RequestError)
        with pytest.raises(RequestError, match="loop cannot be read: Too many levels of symbolic links"):
            read_bounded(tmp_path / "loop", 100, RequestError)
    finally:
        os.close(short)
        server.close()


def test_a_file_that_is_missing_is_the_callers_affair(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "none", tmp_path / "file" / "below"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            read_bounded(place, 5, BundleError)


@pytest.mark.parametrize("name", ["x" * 300, "zero\x00byte", "lone\udcffsurrogate\x1b"])
def test_odd_names_are_refused_with_their_name(tmp_path: Path, name: str) -> None:
    with pytest.raises((BundleError, FileNotFoundError)) as found:
        read_bounded(tmp_path / name, 5, BundleError)
    if isinstance(found.value, BundleError):
        assert "cannot be read" in str(found.value)
        assert str(found.value).isprintable()
        assert len(str(found.value)) < 300


def test_a_file_that_grows_meanwhile_is_not_read_beyond_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "x"
    place.write_bytes(b"1" * 10)
    found = place.stat()
    place.write_bytes(b"1" * 1000)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: found)
    assert len(read_bounded(place, 10, BundleError)) == 10


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    place = tmp_path / "x"
    place.write_bytes(b"1")
    place.chmod(0)
    with pytest.raises(BundleError, match="x cannot be read: Permission denied"):
        read_bounded(place, 5, BundleError)


def test_hashes_are_sha256(tmp_path: Path) -> None:
    place = tmp_path / "x"
    data = os.urandom(3 * 2**20 + 7)
    place.write_bytes(data)
    assert sha256_of(place) == hashlib.sha256(data).hexdigest()


def test_names_are_short_and_plain() -> None:
    assert name_of("a\x1b[31m\n") == r"a\x1b[31m\n"
    assert name_of(Path("/a/b")) == "/a/b"
    assert len(name_of("x" * 10_000)) <= 120
    assert said_by(OSError(28, "No space left on device", "/secret")) == "No space left on device"
    assert said_by(ValueError("embedded\x00")) == r"embedded\x00"


# -- writing ----------------------------------------------------------------------------------------------------------


@posix
def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "x"
    place.write_bytes(b"before")
    before = os.umask(0o022)
    try:
        with written_whole(place) as file:
            file.write(b"af")
            assert place.read_bytes() == b"before"
            (other,) = set(names(tmp_path)) - {"x"}
            assert stat.S_IMODE((tmp_path / other).stat().st_mode) == 0o600, "nobody else reads it meanwhile"
            file.write(b"ter")
    finally:
        os.umask(before)
    assert place.read_bytes() == b"after"
    assert names(tmp_path) == ["x"]
    assert stat.S_IMODE(place.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, MemoryError])
def test_what_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    place = tmp_path / "x"
    place.write_bytes(b"before")

    def write() -> None:
        with written_whole(place) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert place.read_bytes() == b"before"
    assert names(tmp_path) == ["x"]


@posix
def test_no_link_that_lies_there_is_written_through(tmp_path: Path) -> None:
    """Temporary names cannot be foreseen and are made exclusively; the final name is replaced, not followed."""
    (tmp_path / "folder").mkdir()
    victim, place = tmp_path / "victim", tmp_path / "folder" / "x.png"
    victim.write_bytes(b"precious")
    place.symlink_to(victim)
    (tmp_path / "folder" / ".x.png.partial").symlink_to(victim)
    seen = set()
    for _ in range(5):
        with written_whole(place) as file:
            file.write(b"new")
            seen |= {n for n in names(tmp_path / "folder") if n.startswith(".cascade-")}
    assert victim.read_bytes() == b"precious"
    assert not place.is_symlink()
    assert place.read_bytes() == b"new"
    assert len(seen) == 5


@posix
def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    place = tmp_path / "x"
    together = threading.Barrier(4)

    def write(letter: bytes) -> None:
        with written_whole(place) as file:
            for _ in range(20):
                file.write(letter * 10_000)
            together.wait(60)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    data = place.read_bytes()
    assert len(data) == 200_000
    assert len(set(data)) == 1
    assert names(tmp_path) == ["x"]


@posix
@pytest.mark.parametrize("fails", ["write", "fsync", "rename"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    if fails == "fsync":
        monkeypatch.setattr(cascade_rt.files.os, "fsync", full)
    if fails == "rename":
        monkeypatch.setattr(Path, "replace", full)

    def write() -> None:
        with written_whole(tmp_path / "x\x1b") as file:
            if fails == "write":
                full()
            file.write(b"1")

    with pytest.raises(OutputError, match=r"x\\x1b cannot be written: No space left on device"):
        write()
    assert names(tmp_path) == []


def test_files_together_are_all_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {tmp_path / name: name.encode() for name in ("a", "b", "c")}
    synced = []

    def full(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 3:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(cascade_rt.files.os, "fsync", full)
        with pytest.raises(OutputError):
            write_together(contents)
    assert names(tmp_path) == []
    write_together(contents)
    assert names(tmp_path) == ["a", "b", "c"]
    assert (tmp_path / "b").read_bytes() == b"b"


@posix
def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    for place in (tmp_path / "none" / "x", Path("/dev/null/x"), tmp_path / ("x" * 300) / "y"):
        with pytest.raises(OutputError, match="cannot be written: ") as found, written_whole(place):
            pass
        assert len(str(found.value)) < 300
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(OutputError, match="folder cannot be written: Is a directory"),
        written_whole(tmp_path / "folder"),
    ):
        pass
    assert names(tmp_path) == ["folder"]
