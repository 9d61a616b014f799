"""Streams, limits, folders and settings around a command that are not as usual: one line, an exit code, no hang."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hardening.driver import apart, check_line, contents, typed, words_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shells, limits and devices are those of Linux")

QUICK = ("x", "-o", "x.png", "--quiet", "--steps", "1", "--decoder-steps", "1", "--size", "64x64")
RUN = words_of("cascade-run", *QUICK)
INFO = words_of("cascade-info")


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("@ >&-", 1, "standard output is closed"),
        ("@ >/dev/full", 1, "standard output cannot be written: No space left on device"),
        ("@ <&-", 0, ""),
        ("@ 2>&-", 0, ""),
        ("@ 2>/dev/full", 0, ""),
    ],
)
def test_streams(room: Path, shell: str, code: int, said: str) -> None:
    told = apart(INFO, shell=shell, cwd=room)
    assert told.code == code
    if said:
        check_line(told, said)
    else:
        assert told.err == ""
        assert "stage_c.step" in told.out
    assert contents(room) == {}


@pytest.mark.parametrize("shell", ["@ 2>&-", "@ 2>/dev/full", "@ >&- 2>&-", "@ >&- 2>&- <&-"])
def test_a_refusal_that_nobody_can_hear_has_its_exit_code(room: Path, shell: str) -> None:
    told = apart(words_of("cascade-run", "x", "--guidance", "1e9"), shell=shell, cwd=room)
    assert (told.code, told.out, told.err) == (2, "", "")


def test_a_reader_that_leaves(room: Path) -> None:
    told = apart(words_of("cascade-info", "--json"), shell="set -o pipefail; @ | head -c 1", cwd=room)
    assert told.err == ""
    assert told.code in (0, 1)


def test_ascii_only(room: Path) -> None:
    """What a stream has no letters for is written as escapes."""
    told = apart(
        words_of("cascade-info", "größe"),
        cwd=room,
        env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1", "LC_ALL": "C"},
    )
    check_line(told, r"gr\xf6\xdfe", code=2)


@pytest.mark.parametrize("limit", [30_000, 60_000, 160_000, 200_000, 250_000, 350_000])
def test_address_space(room: Path, limit: int) -> None:
    """From too little for Python's libraries to too little for a picture.

    OpenBLAS prints its own line and ends the process where it gets no memory for its buffers.
    """
    told = apart(RUN, shell=f"ulimit -v {limit}; exec", cwd=room)
    if told.err.startswith("OpenBLAS error: Memory allocation"):
        assert told.code == 1
        return
    line = check_line(told, code=1)
    assert "memory" in line
    assert contents(room) == {}


@pytest.mark.parametrize("limit", [128, 256])
def test_stacks(room: Path, limit: int) -> None:
    told = apart(RUN, shell=f"ulimit -s {limit}; exec", cwd=room)
    assert (told.code, told.err) == (0, ""), told


def test_the_largest_file(room: Path) -> None:
    """A limit is a signal by default, which Python ignores."""
    told = apart(RUN, shell="ulimit -f 2; exec", cwd=room)
    check_line(told, "x.png cannot be written: File too large", code=1)
    assert contents(room) == {}


def test_few_open_files(room: Path) -> None:
    told = apart(RUN, shell="ulimit -n 12; exec", cwd=room)
    if told.code != 0:
        check_line(told, code=1)
        assert contents(room) == {}
    else:
        assert told.err == ""


def test_warnings_as_errors(room: Path) -> None:
    told = apart(words_of("cascade-run", *QUICK, flags=["-W", "error"]), cwd=room)
    assert (told.code, told.err) == (0, "")
    long = apart(words_of("cascade-run", "red " * 500, *QUICK[1:], flags=["-W", "error"]), cwd=room)
    check_line(long, "a warning, which Python was told to treat as an error", "cut off", code=1)
    assert list(contents(room)) == ["x.png"]


@pytest.mark.parametrize(
    "value", ["file", "/dev/null", "relative/folder", "", "/nonexistent/deep", "x" * 300, "\x1b[31m"]
)
def test_caches_that_are_no_folders(room: Path, value: str) -> None:
    """A picture on the CPU needs no cache, and says nothing of it."""
    (room / "file").write_text("x")
    told = apart(RUN, cwd=room, env={"XDG_CACHE_HOME": str(room / "file") if value == "file" else value})
    assert (told.code, told.err) == (0, ""), told.err
    assert sorted(contents(room)) == ["file", "x.png"]


@pytest.mark.parametrize("home", [None, "", "/nonexistent"])
def test_no_home(room: Path, home: str | None) -> None:
    told = apart(RUN, cwd=room, env={"HOME": home, "XDG_CACHE_HOME": None})
    assert (told.code, told.err) == (0, ""), told.err
    assert list(contents(room)) == ["x.png"]


def test_a_removed_working_folder(room: Path) -> None:
    gone = "mkdir gone; cd gone; rmdir ../gone; exec"
    check_line(apart(RUN, shell=gone, cwd=room), "x.png cannot be written", code=1)
    check_line(apart(words_of("cascade-info", "bundle"), shell=gone, cwd=room), "there is no bundle at bundle", code=2)
    check_line(
        apart(words_of("cascade-export", "--stage", "a", "--size", "tiny", "--out", "o"), shell=gone, cwd=room),
        "the current folder has been removed",
        code=1,
    )
    assert contents(room) == {}


# -- folders and disks ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["full", "read-only"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small disk that is full, or that cannot be written to."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=64k none '{folder}' 2>/dev/null") != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        (folder / "mine").write_bytes(b"x" * (64 << 10))
        if request.param == "read-only":
            assert os.system(f"mount -o remount,ro '{folder}'") == 0
        yield folder
    finally:
        os.system(f"umount -l '{folder}'")


def test_no_writer_leaves_anything_on_a_disk_that_takes_nothing(disk: Path, vqgan: Path) -> None:
    """Pictures, several of them, previews, and a bundle that is made."""
    from cascade_export.cli import main
    from cascade_rt.entry import main_run

    before = contents(disk)
    quick = ("--quiet", "--steps", "1", "--decoder-steps", "1")
    reasons = ("No space left on device", "Read-only file system", "cannot be written", "MiB free")
    for arguments in (
        ("-o", disk / "x.png"),
        ("-o", disk / "x.jpg", "--images", "3"),
        ("-o", disk / "x.webp", "--images", "2"),
    ):
        line = check_line(typed(main_run, "x", *arguments, *quick), code=1)
        assert any(reason in line for reason in reasons), line
        assert str(disk) in line
        assert contents(disk) == before
    told = typed(
        main, "--stage", "a", "--checkpoint", vqgan, "--out", disk / "deep" / "bundle", "--no-verify", "--quiet"
    )
    line = check_line(told, code=1)
    assert any(reason in line for reason in reasons), line
    assert contents(disk) == before


@pytest.mark.slow
def test_a_bundle_that_is_added_to_survives_a_full_disk(tmp_path: Path, vqgan: Path) -> None:
    from cascade_export.cli import main
    from cascade_rt.bundle import Bundle

    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=3m none '{disk}' 2>/dev/null") != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        common = ("--checkpoint", vqgan, "--out", disk / "bundle", "--stage", "a", "--no-verify", "--quiet")
        assert typed(main, *common).code == 0
        used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*") if path.is_file())
        (disk / "mine").write_bytes(b"x" * ((3 << 20) - used - 40_000))
        before = contents(disk)
        check_line(typed(main, *common, "--overwrite", "--precision", "fp16"), code=1)
        assert contents(disk) == before
        bundle = Bundle(disk / "bundle")
        for name in bundle.manifest.files:
            bundle.file(name)
    finally:
        os.system(f"umount -l '{disk}'")


def test_files_of_others() -> None:
    """What a user may not read or write is named; root may do everything, so that this is another user then."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's folders are closed to other users
        check_files_of_others(Path(folder))


def check_files_of_others(room: Path) -> None:
    user = 65534 if os.geteuid() == 0 else None
    (room / "secret.png").write_bytes(b"x")
    (room / "secret.png").chmod(0)
    (room / "closed").mkdir(mode=0)
    room.chmod(0o555)
    if apart([sys.executable, "-c", "import cascade_rt.cli"], cwd=room, user=user).code != 0:
        pytest.skip("another user cannot run the package here")
    try:
        for arguments, named in (
            (("x", "--init", "secret.png", "-o", "/tmp/x.png"), "secret.png"),
            (("x", "--from", "secret.png"), "secret.png"),
            (("x", "-o", "closed/x.png"), "closed"),
            (("x", "-o", "x.png"), "."),
            (("x", "--bundle", "closed"), "closed"),
            (("x", "--lora", "secret.png", "-o", "/tmp/x.png"), "secret.png"),
        ):
            check_line(apart(words_of("cascade-run", *arguments), cwd=room, user=user), named)
        assert sorted(path.name for path in room.iterdir()) == ["closed", "secret.png"]
    finally:
        room.chmod(0o755)
        (room / "closed").chmod(0o755)
