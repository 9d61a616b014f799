"""``cascade-serve`` as a process: what it refuses to begin with, and how it ends."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from cascade_rt.errors import RequestError
from cascade_rt.serve import cli

from .conftest import wait_until

LOGGERS = ("cascade_rt.serve", "uvicorn.error")
COMMAND = [sys.executable, "-m", "cascade_rt.serve.cli"]


@pytest.fixture(autouse=True)
def no_service_of_the_tests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What should have been refused and was not ends the test, instead of serving for ever."""

    def run(*_: object) -> None:
        raise AssertionError("it began to serve")

    monkeypatch.setattr(cli, "run", run)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    before = [list(logging.getLogger(name).handlers) for name in LOGGERS]
    assert cli.main(list(argv)) in (1, 2)
    assert before == [logging.getLogger(name).handlers for name in LOGGERS]  # it leaves the log as it was
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--port", "70000"], "--port 70000"),
        (["--port", "x"], "--port"),
        (["--max-batch", "0"], "--max-batch 0"),
        (["--queue", "0"], "--queue 0"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--grace", "-1"], "--grace"),
        (["--workers", "0"], "--workers '0'"),
        (["--workers", "1-2"], "--ray"),
        (["--workers", "3-2", "--ray"], "--workers '3-2'"),
        (["--context-memory", "inf"], "--context-memory inf"),
        (["--max-pixels", "1"], "--max-pixels 1"),
        (["--bundle", "nowhere"], "nowhere"),
        (["--bundle", "a b=nowhere"], "nowhere"),
        (["--api-key-file", "nowhere.txt"], "nowhere.txt"),
        (["--provider", "magic"], "'magic'"),
        (["--host", "300.1.1.1"], "300.1.1.1"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    assert named in refused(capsys, *argv)


def test_two_models_need_two_names(capsys: pytest.CaptureFixture[str], shipped: Path) -> None:
    assert "NAME=DIR" in refused(capsys, "--bundle", str(shipped), "--bundle", str(shipped))
    assert set(cli.open_bundles([f"a={shipped}", f"b/c={shipped}"])) == {"a", "b/c"}
    with pytest.raises(RequestError, match="cannot be the name"):
        cli.open_bundles([f"../a={shipped}"])


def test_a_key_file_holds_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n first \n\nsecond\n")
    assert cli.read_keys(file) == ("first", "second")
    file.write_text("# none\n\n")
    with pytest.raises(RequestError, match="holds no key"):
        cli.read_keys(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="UTF-8"):
        cli.read_keys(file)


@pytest.mark.parametrize(
    ("host", "only_here"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("me.local", False),
    ],
)
def test_loopback(host: str, only_here: bool) -> None:
    assert cli.is_loopback(host) is only_here


class Process:
    def __init__(self, *argv: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "--port", "0", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    @property
    def url(self) -> str:
        wait_until(lambda: any("cascade-serve: http" in line for line in self.lines))
        found = re.search(r"http://\S+", "".join(self.lines))
        assert found is not None
        return found[0]

    def ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False


@contextmanager
def process(*argv: str) -> Iterator[Process]:
    made = Process(*argv)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait(30)


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess.run(
            [*COMMAND, "--port", str(taken.getsockname()[1])], capture_output=True, check=False, text=True, timeout=60
        )
    assert done.returncode == 1
    assert "cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_finishes_what_runs_and_refuses_what_comes() -> None:
    with process("--grace", "30") as mine:
        wait_until(mine.ready, 60)
        answers: list[httpx2.Response] = []
        body = {"prompt": "a star", "num_inference_steps": 150, "seed": 0}
        asking = threading.Thread(
            target=lambda: answers.append(httpx2.post(f"{mine.url}/v1/images/generations", json=body, timeout=60)),
            daemon=True,
        )
        asking.start()
        time.sleep(0.5)
        mine.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx2.TransportError):
            httpx2.post(f"{mine.url}/v1/images/generations", json=body, timeout=5)
        asking.join(70)
        assert answers[0].status_code == 200
        assert mine.process.wait(20) == 0
    assert "Traceback" not in "".join(mine.lines)


def test_sigterm_does_not_wait_longer_than_the_grace() -> None:
    with process("--grace", "1") as mine:
        wait_until(mine.ready, 60)
        body = {"prompt": "a star", "num_inference_steps": 1000, "n": 10}

        statuses: list[int] = []

        def ask() -> None:
            answer = httpx2.post(f"{mine.url}/v1/images/generations", json=body, timeout=60)
            statuses.extend([answer.status_code, int(answer.headers["retry-after"])])

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        time.sleep(0.5)
        started = time.monotonic()
        mine.process.send_signal(signal.SIGTERM)
        assert mine.process.wait(20) == 0
        assert time.monotonic() - started < 6
        asking.join(70)
        assert statuses == [503, 2]


def test_a_damaged_bundle_ends_the_process_with_one_line(linked: Path, own_file) -> None:  # type: ignore[no-untyped-def]
    engine = own_file(linked / "stage_b.step.onnx")
    engine.write_bytes(b"\0" * engine.stat().st_size)
    done = subprocess.run(
        [*COMMAND, "--port", "0", "--bundle", str(linked)], capture_output=True, check=False, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "damaged" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_open_address_without_keys_is_warned_of() -> None:
    with process("--host", "0.0.0.0") as mine:
        wait_until(lambda: any("cascade-serve: http" in line for line in mine.lines))
    assert any(line.startswith("warning: 0.0.0.0") for line in mine.lines)


def test_two_workers_draw_the_same(tmp_path: Path) -> None:
    with process("--workers", "2", "--max-batch", "1") as mine:
        wait_until(mine.ready, 60)
        body = {"prompt": "a star", "num_inference_steps": 3, "decoder_num_inference_steps": 1, "seed": 0}
        texts = {
            httpx2.post(f"{mine.url}/v1/images/generations", json=body, timeout=60).json()["data"][0]["b64_json"]
            for _ in range(3)
        }
    assert len(texts) == 1
    assert all(json.loads(line) for line in mine.lines if line.startswith("{"))
