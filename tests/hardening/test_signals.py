"""Signals at thirty moments of a run and of an export: nothing half-made under a final name, and a rerun tidies up."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cascade_rt.bundle import Bundle
from hardening.driver import apart, words_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and forks are those of POSIX"),
]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
MOMENTS = 30
INTERRUPTED = "error: interrupted; nothing half-written was left behind\n"


def check_end(code: int, errors: str, number: int, moment: float) -> None:
    """The command was done already, or stopped as the signal says."""
    if number == signal.SIGKILL:
        assert code in (0, -signal.SIGKILL), (code, errors)
    elif code == -number or (number == signal.SIGINT and "KeyboardInterrupt" in errors):
        # it came before our code could answer: while the interpreter itself begins
        assert moment < 0.5, (code, moment)
    else:
        assert (code, errors) in ((0, ""), (1, INTERRUPTED)), (code, errors, number, moment)


def test_thirty_moments_of_a_run(room: Path) -> None:
    words = words_of("cascade-run", "x", "-o", "x.png", "--quiet", "--images", "2", "--steps", "3")
    whole = apart(words, cwd=room)
    assert whole.code == 0
    names = {"x-1.png", "x-2.png"}
    stopped = 0
    for index in range(MOMENTS):
        for path in room.iterdir():
            path.unlink()
        number, moment = SIGNALS[index % 3], whole.seconds * (index + 0.5) / MOMENTS
        running = subprocess.Popen(words, cwd=room, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(moment)
        running.send_signal(number)
        _, errors = running.communicate(timeout=60)
        check_end(running.returncode, errors, number, moment)
        stopped += running.returncode != 0
        left = {path.name for path in room.iterdir()}
        assert left - names == set() or number == signal.SIGKILL, left
        for name in left & names:
            Image.open(room / name).load()
    assert stopped > MOMENTS // 2
    assert apart(words, cwd=room).code == 0
    assert names <= {path.name for path in room.iterdir()}


PATIENCE = 120.0
"""Seconds after which an export that does not end is killed."""

WARM = """
import json, os, signal, sys, time
from cascade_export.cli import main
warm, patience = json.loads(sys.stdin.readline())
said = os.dup(1)
os.dup2(2, 1)  # what it says is of no interest
main(warm)
sys.stdout.flush()
os.dup2(said, 1)

def ended(child):
    end = time.monotonic() + patience
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 124
        time.sleep(0.002)

for line in sys.stdin:
    arguments, log = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code = main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(ended(child), flush=True)
"""
"""Exports in forks of a process that has exported before: to import torch and its exporter takes longer than that."""


STAGE = ("--stage", "previewer", "--checkpoint", "random:1", "--size", "big", "--precision", "fp32")


class Exports:
    """Exports in processes of their own that begin at once."""

    def __init__(self, log: Path) -> None:
        self._log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._warm = subprocess.Popen(
            [sys.executable, "-c", WARM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=log.parent,
        )
        warm = [*STAGE, "--no-verify", "--quiet", "--out", str(log.parent / "warm")]
        self._tell([warm, PATIENCE])

    def _tell(self, words: list[Any]) -> None:
        assert self._warm.stdin is not None
        self._warm.stdin.write(json.dumps(words) + "\n")
        self._warm.stdin.flush()

    def run(self, *arguments: object, number: int = 0, moment: float = 0.0) -> tuple[int, str]:
        """Exit code and standard error of an export that gets a signal after some seconds; number 0: none."""
        stdout = self._warm.stdout
        assert stdout is not None
        self._log.write_text("")
        self._tell([[str(a) for a in arguments], str(self._log)])
        child = int(stdout.readline())
        if number:
            time.sleep(moment)
            with contextlib.suppress(ProcessLookupError):  # it is done already
                os.kill(child, number)
        code = int(stdout.readline())
        assert code != 124, f"an export did not end within {PATIENCE} s: {self._log.read_text()}"
        if code < 0 and code != -number:
            print(self._log.read_text())  # the process died of something else
        lines = [line for line in self._log.read_text().splitlines(keepends=True) if line.startswith("error: ")]
        return code, "".join(lines)

    def close(self) -> None:
        assert self._warm.stdin is not None
        self._warm.stdin.close()
        self._warm.wait(60)


@pytest.fixture
def exports(tmp_path: Path) -> Iterator[Exports]:
    made = Exports(tmp_path / "log")
    yield made
    made.close()


def check_whole(place: Path) -> None:
    bundle = Bundle(place)
    for name in bundle.manifest.files:
        bundle.file(name)


def stray(place: Path) -> set[str]:
    """What lies in and beside a bundle and belongs to nobody."""
    inside = {p.name for p in place.iterdir()} - {*Bundle(place).manifest.files, "cascade.json", "NOTES.txt"}
    return inside | {path.name for path in place.parent.iterdir() if path != place}


def test_thirty_moments_of_an_export(room: Path, vqgan: Path, exports: Exports) -> None:
    """Half of the moments are of an export into a new bundle, half of one into a bundle that is added to."""
    place, base = room / "bundle", room.parent / "base"
    common = (*STAGE, "--no-verify", "--quiet", "--out", place)
    assert exports.run("--stage", "a", "--checkpoint", vqgan, "--no-verify", "--quiet", "--out", base)[0] == 0
    (base / "NOTES.txt").write_text("mine")

    def begin(adding: bool) -> None:
        shutil.rmtree(room)
        room.mkdir()
        if adding:
            shutil.copytree(base, place)

    begin(True)
    started = time.monotonic()
    assert exports.run(*common)[0] == 0
    seconds = time.monotonic() - started
    stopped = 0
    for index in range(MOMENTS):
        number, adding = SIGNALS[index % 3], index % 2 == 0
        # the second half of the moments lies around the end, where the bundle takes its place
        half = MOMENTS // 2
        share = index / half * 0.7 if index < half else 0.7 + (index - half) / half * 0.4
        begin(adding)
        code, errors = exports.run(*common, number=number, moment=seconds * share)
        check_end(code, errors, number, 1.0 if index > 3 else 0.0)
        stopped += code != 0
        if place.exists():
            check_whole(place)
            assert not adding or (place / "NOTES.txt").read_text() == "mine"
        if number != signal.SIGKILL:
            assert not {p.name for p in room.iterdir()} - {"bundle"}
            assert not place.exists() or stray(place) == set()
        else:  # it alone leaves something behind, which the next export tidies up
            assert exports.run(*common, "--overwrite")[0] == 0, "a rerun succeeds"
            check_whole(place)
            assert stray(place) == set()
            assert not adding or (place / "NOTES.txt").read_text() == "mine"
    assert stopped >= 5, "moments of work, and not only of what is done"
