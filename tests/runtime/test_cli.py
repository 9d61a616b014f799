"""The commands, as typed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import cascade_rt
from cascade_rt import OutputError, Request, RequestError
from cascade_rt.cli import parse_size, requested, run_parser
from cascade_rt.commands import FAILED, check_interrupt, run_command, worded
from cascade_rt.entry import FLAGS, main_info, main_run
from cascade_rt.image import read_request
from cascade_rt.manifest import MANIFEST, Manifest

QUICK = ["--steps", "1", "--decoder-steps", "1"]
INTERRUPTED = "error: interrupted; nothing half-written was left behind\n"


posix = pytest.mark.skipif(os.name != "posix", reason="signals, devices and shells are those of POSIX")


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


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


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp"])
def test_a_picture_is_made_again_from_itself(shipped: Path, tmp_path: Path, ending: str) -> None:
    """Every default is in the request that it carries, so that another bundle's defaults would change nothing."""
    first, again = tmp_path / f"first.{ending}", tmp_path / f"again.{ending}"
    prompt = 'ein großer "roter" Kreis\n🔴'
    arguments = [
        "--seed",
        "5",
        "--size",
        "128x192",
        "--guidance",
        "2.5",
        "--negative",
        "grün",
        "--sampler",
        "diffusers",
    ]
    assert main_run([prompt, "-o", str(first), "--quiet", *arguments, *QUICK]) == 0
    assert main_run(["--from", str(first), "-o", str(again), "--quiet"]) == 0
    assert first.read_bytes() == again.read_bytes()
    carried = Request.from_json(read_request(first))
    assert carried.prompt == prompt
    assert carried.seeds == (5,)
    assert (carried.width, carried.height, carried.sampler) == (128, 192, "diffusers")
    assert carried.negative_prompt == "grün"
    assert carried.prior.guidance_scale == 2.5
    assert (carried.prior.num_inference_steps, carried.decoder.num_inference_steps) == (1, 1)
    other = tmp_path / f"other.{ending}"
    assert main_run(["--from", str(first), "-o", str(other), "--quiet", "--seed", "6"]) == 0
    assert not np.array_equal(pixels(first), pixels(other)), "a flag changes the request"


def test_several_pictures_are_numbered_and_each_is_made_again_alone(shipped: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    assert main_run(["a", "--bundle", str(shipped), "-o", str(out), "--images", "2", "--seed", "7", *QUICK]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-1.png", "x-2.png"]
    for index in (1, 2):
        one = tmp_path / f"x-{index}.png"
        assert Image.open(one).text["seed"] == str(6 + index)
        assert main_run(["--from", str(one), "-o", str(tmp_path / "again.png")]) == 0
        difference = np.abs(pixels(one).astype(int) - pixels(tmp_path / "again.png"))
        assert difference.max() <= 1


def test_pictures_are_written_together_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cascade_rt.files

    written: list[int] = []

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cascade_rt.files.os, "fsync", full)
    assert main_run(["a", "-o", str(tmp_path / "x.png"), "--images", "3", *QUICK]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@posix
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "63x64"], 2, "--size: width 63 is not accepted; it must be an integer from 64 to 4096"),
        (["--size", "0x64"], 2, "--size: width 0"),
        (["--size", "64x1000000"], 2, "--size: height 1000000"),
        (["--size=-64x64"], 2, "--size: width -64"),
        (["--size", "-64x64"], 2, "--size: expected one argument; see cascade-run --help"),
        (["--size", "big"], 2, "--size 'big' is not accepted; write it as WIDTHxHEIGHT, for example 1024x1024"),
        (["--size", "9" * 5000 + "x64"], 2, "--size '999"),
        (["--size", "²x64"], 2, "--size '²x64' is not accepted"),
        (["--images", "two"], 2, "--images 'two' is not accepted; it must be an integer from 1 to 1024"),
        (["--images", "0"], 2, "--images 0 is not accepted"),
        (["--images", "1000", "--guidance", "1"], 2, "1000 pictures at once are not accepted"),
        (["--images", "9" * 5000], 2, "--images"),
        (["--colour"], 2, "unrecognized arguments: --colour"),
        (["--steps", "0"], 2, "--steps 0 is not accepted; it must be an integer from 1 to 1000"),
        (["--decoder-steps", "1001"], 2, "--decoder-steps 1001"),
        (["--guidance", "nan"], 2, "--guidance 'nan' is not accepted; it must be a finite number from -1000 to 1000"),
        (["--decoder-guidance", "1e400"], 2, "--decoder-guidance '1e400' is not accepted"),
        (["--seed", "-1"], 2, "--seed -1 is not accepted; it must be an integer from 0 to 2**64 - 1"),
        (["--seed", "99999999999999999999"], 2, "--seed 99999999999999999999"),
        (["--seed", "1.5"], 2, "--seed '1.5' is not accepted; it must be an integer from 0"),
        (["--sampler", "euler"], 2, "--sampler 'euler' is not known; accepted: original, diffusers"),
        (["--provider", "gpu"], 2, "--provider 'gpu' is not known; accepted: auto, cpu"),
        (["--threads", "-3"], 2, "--threads -3 is not accepted; it must be an integer from 1 to 1024"),
        (["--threads", "2147483648"], 2, "--threads 2147483648"),
        (["--bundle", "/no/such/place"], 2, "there is no bundle at /no/such/place"),
        (["--bundle", "~nobody-of-this-name/x"], 2, "~nobody-of-this-name"),
        (["-o", "x.gif"], 2, "-o x.gif is not accepted; pictures are written as .png, .jpg"),
        (["-o", "x"], 2, "-o x is not accepted"),
        (["-o", "/no/such/folder/x.png"], 1, "the folder /no/such/folder does not exist; make it with: mkdir -p"),
        (["-o", "x" * 300 + ".png"], 1, "File name too long"),
        (["-o", "/dev/null/x.png"], 1, "/dev/null"),
        (["--from", "/no/such/picture.png"], 2, "there is no picture /no/such/picture.png"),
        (["--from", __file__], 2, "cannot be read as a picture"),
        (["--from", "/dev/zero"], 2, "/dev/zero is no regular file"),
    ],
)
def test_bad_requests_are_one_line(
    shipped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = [] if "--bundle" in arguments else ["--bundle", str(shipped)]
    assert main_run(["x", *bundle, *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err) < 600
    assert list(tmp_path.iterdir()) == []


def test_no_prompt_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_run([]) == 2
    assert "there is no prompt; write what to draw, for example: cascade-run 'a red circle'" in capsys.readouterr().err


@posix
def test_terminal_escapes_of_a_prompt_or_a_name_do_not_reach_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "\x1b[31m"
    assert main_run(["x", "--bundle", f"/no/{bad}", "-o", str(tmp_path / "x.png")]) == 2
    assert main_run(["x", "--sampler", bad, "-o", str(tmp_path / "x.png")]) == 2
    assert main_run(["x", "-o", f"{tmp_path}/{bad}/x.png"]) == 1
    assert main_run([f"red {bad} " * 100, "-o", str(tmp_path / "x.png"), *QUICK]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 4
    assert all(r"\x1b[31m" in line for line in lines)


@pytest.mark.parametrize("command", [main_run, main_info])
def test_help_has_an_example(command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(["--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_the_examples_of_the_help_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    from cascade_rt.cli import RUN_EXAMPLES

    for line in RUN_EXAMPLES.splitlines()[1:]:
        words = shlex.split(line)
        assert words[0] == "cascade-run"
        args = run_parser().parse_args(words[1:])
        if args.source is None:
            assert requested(args).seeds


def test_sizes_are_width_first() -> None:
    assert parse_size("300x200") == (300, 200)
    assert parse_size(None) == (None, None)
    request = requested(run_parser().parse_args(["x", "--size", "300x200"]))
    assert (request.width, request.height) == (300, 200)


def test_further_pictures_have_the_next_seeds() -> None:
    def seeds(*arguments: str) -> tuple[int, ...] | None:
        return requested(run_parser().parse_args(["x", *arguments])).seeds

    assert seeds("--seed", "5", "--images", "3") == (5, 6, 7)
    assert seeds("--seed", str(2**64 - 1), "--images", "2") == (2**64 - 1, 0)
    assert seeds() != seeds()


def test_every_field_has_its_flag() -> None:
    """The names in errors are those that the command line has."""
    known = {flag for action in run_parser()._actions for flag in action.option_strings} | {"PROMPT"}
    assert {flag.partition(":")[0] for flag in FLAGS.values()} <= known
    error = RequestError("height 3 is not accepted", field="height")
    assert worded(error, FLAGS) == "--size: height 3 is not accepted"
    assert worded(RequestError("no field", field="other"), FLAGS) == "no field"


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
    manifest = Manifest.from_json((shipped / MANIFEST).read_bytes(), MANIFEST)
    assert capsys.readouterr().out == manifest.to_json()
    assert main_info(["/no/such/place"]) == 2


def test_info_shows_texts_of_a_bundle_as_plain_text(linked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = linked / MANIFEST
    manifest = Manifest.from_json(place.read_bytes(), MANIFEST)
    model = msgspec.structs.replace(manifest.model, name="x\x1b[2J", source="y\x9b31m")
    models = dict(manifest.models)
    models["stage_c"] = msgspec.structs.replace(models["stage_c"], loras=("z\x1b]0;",))
    place.write_text(msgspec.structs.replace(manifest, model=model, models=models).to_json())
    for arguments in ([str(linked)], [str(linked), "--json"]):
        assert main_info(arguments) == 0
        shown = capsys.readouterr().out
        assert "stage_c" in shown
        assert all(line.isprintable() for line in shown.splitlines())


def test_info_finds_a_damaged_file(
    linked: Path, own_file: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = own_file(linked / "stage_a.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main_info([str(linked)]) == 0
    assert main_info([str(linked), "--check"]) == 1
    assert "stage_a.safetensors is damaged" in capsys.readouterr().err


def test_the_version_is_one_number() -> None:
    from importlib.metadata import version

    assert version("cascade-rt") == cascade_rt.__version__


def test_what_errors_tell_to_type_is_accepted(shipped: Path, tmp_path: Path) -> None:
    """Every suggested command parses, as far as its flags go."""
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


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["numpy", "PIL.Image", "tokenizers", "onnxruntime"])
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path, number: int, module: str) -> None:
    """The signal comes when the import of a module begins, and it must have come: the exit code says so."""
    code = f"""
import signal, sys
from cascade_rt.entry import main_run

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            print("signalled", flush=True)
            signal.raise_signal({int(number)})

assert {module!r} not in sys.modules
sys.meta_path.insert(0, Interrupting())
sys.exit(main_run(["x", "-o", {str(tmp_path / "x.png")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "signalled\n", done.stderr
    assert done.stderr == INTERRUPTED
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


MOMENTS = {
    "an engine is opened": "cascade_rt.loader.open_engine",
    "a step is run": "cascade_rt.loop.StepBatch.step",
    "texts are encoded": "cascade_rt.runner.encode_texts",
    "the picture is encoded": "cascade_rt.cli.encode_picture",
    "the picture is put on the disk": "cascade_rt.files.os.fsync",
}


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_while_working_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, moment: str
) -> None:
    package, module, *parts, name = MOMENTS[moment].split(".")
    owner: Any = importlib.import_module(f"{package}.{module}")
    for part in parts:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    before = signal.getsignal(number)
    monkeypatch.setattr(owner, name, interrupting)
    assert main_run(["x", "-o", str(tmp_path / "x.png"), *QUICK]) == 1
    monkeypatch.undo()
    assert calls, "the moment came"
    captured = capsys.readouterr()
    assert captured.err == INTERRUPTED
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before
    assert main_run(["x", "-o", str(tmp_path / "x.png"), *QUICK]) == 0, "and once more works"


def test_an_interrupt_that_was_lost_is_not_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    """Python drops what a handler raises inside a destructor; the command stops at the next checkpoint."""

    def command() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        check_interrupt()
        raise AssertionError("went on")

    assert run_command(command) == 1
    assert capsys.readouterr().err == INTERRUPTED
    assert run_command(check_interrupt) == 0


# -- what goes wrong around a command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "there is not enough memory for this; use --low-memory, or a smaller --size"),
        (RecursionError("deep"), "the stack is too small for this; raise its limit with: ulimit -s 8192"),
        (UserWarning("odd"), "a warning, which Python was told to treat as an error: odd"),
        (OSError(28, "No space left on device", "/a\x1b"), r"the system refused: No space left on device (/a\x1b)"),
        (OutputError("x\ny"), "x y"),
    ],
)
def test_every_expected_failure_is_one_line(error: Exception, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    assert run_command(command) == FAILED
    assert capsys.readouterr().err == f"error: {message}\n"


def test_what_is_not_expected_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: print(1 / 0))


@posix
@pytest.mark.parametrize("how", ["closed", "full", "ascii", "pipe"])
def test_standard_output_may_be_anything(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that cannot be written is one line and a failure; letters that a stream lacks are written as escapes."""
    code = (
        "import sys; from cascade_rt.commands import run_command; sys.exit(run_command(lambda: print('größe ' * 9000)))"
    )
    shell = {
        "closed": '"$0" -c "$1" >&-',
        "full": '"$0" -c "$1" >/dev/full',
        "ascii": 'PYTHONIOENCODING=ascii "$0" -c "$1" >/dev/null',
        "pipe": 'set -o pipefail; "$0" -c "$1" | true',
    }[how]
    if how == "full" and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, code], capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1
    if how == "full":
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
    if how == "ascii":
        assert (done.returncode, done.stderr) == (0, "")


def test_standard_error_may_be_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise RequestError("no")

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert run_command(command) == 2
