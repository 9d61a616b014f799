"""The commands, as typed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from PIL import Image

import cascade_rt
from cascade_rt.commands import main_info, main_run

QUICK = ["--steps", "1", "--decoder-steps", "1"]


def test_run_writes_a_png_that_says_what_it_is(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.png"
    assert main_run(["a red circle", "--bundle", str(shipped), "-o", str(out), "--seed", "0", "--json", *QUICK]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert report["files"] == [str(out)]
    assert set(report["seconds"]) == {"load", "text_encoder", "stage_c", "stage_b", "stage_a", "total"}
    image = Image.open(out)
    assert image.size == (report["width"], report["height"]) == (256, 256)
    assert image.text["prompt"] == "a red circle"
    assert image.text["seed"] == "0"
    assert {"sampler", "steps", "bundle", "guidance"} <= set(image.text)
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_several_pictures_are_numbered(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x.png")
    assert main_run(["a", "--bundle", str(shipped), "-o", out, "--images", "2", "--size", "128x192", *QUICK]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-1.png", "x-2.png"]
    assert Image.open(tmp_path / "x-1.png").size == (128, 192)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "63x64"], 2, "width 63 is not accepted"),
        (["--size", "0x64"], 2, "width 0"),
        (["--size", "1000000x1024"], 2, "width 1000000"),
        (["--size=-64x64"], 2, "width -64"),
        (["--size", "-64x64"], 2, "--size: expected one argument; see cascade-run --help"),
        (["--images", "two"], 2, "invalid int value: 'two'"),
        (["--colour"], 2, "unrecognized arguments: --colour"),
        (["--size", "big"], 2, "WIDTHxHEIGHT"),
        (["--steps", "0"], 2, "0 steps"),
        (["--guidance", "nan"], 2, "nan is not accepted"),
        (["--seed", "-1"], 2, "seed -1"),
        (["--seed", "99999999999999999999"], 2, "seed 99999999999999999999"),
        (["--sampler", "euler"], 2, "original, diffusers"),
        (["--provider", "gpu"], 2, "accepted: auto, cpu"),
        (["--bundle", "/no/such/place"], 2, "there is no bundle"),
        (["-o", "x.jpg"], 2, "no PNG name"),
        (["--threads", "-3"], 2, "threads -3 is not accepted"),
        (["--images", "1000"], 2, "1000 pictures at once"),
        (["-o", "/no/such/folder/x.png"], 1, "does not exist"),
    ],
)
def test_bad_requests_are_one_line(
    shipped: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main_run(["x", "--bundle", str(shipped), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert message in captured.err


@pytest.mark.parametrize("command", [main_run, main_info])
def test_help_has_an_example(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(["--help"])  # type: ignore[operator]
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_a_long_prompt_is_a_warning(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.png"
    assert main_run(["red " * 2500, "--bundle", str(shipped), "-o", str(out), *QUICK]) == 0
    assert "this part of the prompt was cut off" in capsys.readouterr().err
    assert out.is_file()


def test_info(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_info([str(shipped), "--check"]) == 0
    table = capsys.readouterr().out
    assert "stage_c.step" in table
    assert "all hashes right" in table
    assert main_info([str(shipped), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format_version"] == 1
    assert main_info(["/no/such/place"]) == 2


def test_the_version_is_one_number() -> None:
    from importlib.metadata import version

    assert version("cascade-rt") == cascade_rt.__version__


def test_what_errors_tell_to_type_is_accepted(shipped: Path, tmp_path: Path) -> None:
    """Every suggested command parses, as far as its flags go."""
    import importlib.util
    import re

    from cascade_rt.bundle import Bundle

    if importlib.util.find_spec("torch") is None:
        pytest.skip("cascade-export is not installed here")
    from cascade_export.cli import parse_args

    bundle = Bundle(shipped)
    assert main_info([str(tmp_path)]) == 2
    texts = [bundle._rebuild(), bundle.command("stage_c.step"), bundle.command("stage_b.step", "tensorrt-rtx", 89)]
    for text in texts:
        found = re.search(r"cascade-export (.*)", text)
        assert found is not None
        assert parse_args(found[1].split()).stage


def test_ctrl_c_while_loading_is_one_line(shipped: Path, tmp_path: Path) -> None:
    import signal
    import subprocess
    import sys
    import time

    out = tmp_path / "x.png"
    arguments = ["x", "--bundle", str(shipped), "-o", str(out)]
    code = "import sys; from cascade_rt.commands import main_run; print('ready', flush=True); "
    code += f"sys.exit(main_run({arguments!r}))"
    for wait in (0.05, 0.2, 0.4):
        running = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        time.sleep(wait)
        if running.poll() is None:
            running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
        assert "Traceback" not in errors
        assert {p.name for p in tmp_path.iterdir()} <= {"x.png"}


def test_an_interrupt_that_was_lost_is_not_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    """Python drops what a handler raises inside a destructor; the command stops at the next checkpoint."""
    import signal

    from cascade_rt.commands import check_interrupt, run_command

    def command() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        check_interrupt()
        raise AssertionError("went on")

    assert run_command(command) == 1
    assert capsys.readouterr().err == "error: interrupted; nothing half-written was left behind\n"
    assert run_command(check_interrupt) == 0
