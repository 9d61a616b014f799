"""The exporter: graphs, manifests, atomicity, and every kind of bad input."""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
import torch
from msgspec.structs import replace as with_fields
from safetensors.torch import load_file, save_file

from cascade_export import exporter, weights_file
from cascade_export.checkpoints import open_checkpoint
from cascade_export.cli import main
from cascade_export.exporter import export
from cascade_export.job import ExportRequest
from cascade_export.models import StageA, StageAConfig
from cascade_rt import BundleError, ExportError, OutputError
from cascade_rt.bundle import Bundle, default_bundle_path
from cascade_rt.stages import ENGINES, PRECISIONS

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "engines" / "cascade.schema.json").read_text())
STAGE_A = {"_class_name": "PaellaVQModel", "embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 4}


@pytest.fixture
def vqgan(tmp_path: Path) -> Path:
    """The smallest checkpoint: a Stage A."""
    folder = tmp_path / "vqgan"
    folder.mkdir()
    module = StageA(StageAConfig.from_dict(STAGE_A))
    save_file(module.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(STAGE_A))
    return folder


def command(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def request(out: Path, **options: Any) -> ExportRequest:
    return ExportRequest(**{"stages": ("a",), "precision": PRECISIONS["fp32"], "out": out, "quiet": True, **options})


def left_behind(folder: Path) -> list[str]:
    """Everything in a folder but the checkpoint, hidden files too."""
    return sorted(p.name for p in folder.iterdir() if p.name != "vqgan")


def test_a_stage_becomes_a_bundle(vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", out) == 0
    printed = capsys.readouterr()
    assert "from fp32 PyTorch" in printed.out
    assert str(out) in printed.out
    assert printed.err == ""
    bundle = Bundle(out)
    jsonschema.validate(json.loads((out / "cascade.json").read_text()), SCHEMA)
    record = bundle.engine("stage_a.decode")
    assert record.precision == PRECISIONS["fp32"]
    assert record.verification is not None
    assert 0 < record.verification.rel_l2 < 2e-5
    assert record.verification.psnr is not None
    assert record.verification.psnr > 60
    assert str(tmp_path) not in (out / "cascade.json").read_text()
    assert left_behind(tmp_path) == ["out"]
    assert {p.name for p in out.iterdir()} == {*bundle.manifest.files, "cascade.json"}
    # initializers are named as the checkpoint's keys and lie in the safetensors file, which any tool can read
    graph = onnx.load(out / "stage_a.decode.onnx", load_external_data=False).graph
    external = {i.name for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL}
    stored = load_file(out / "stage_a.safetensors")
    original = load_file(vqgan / "diffusion_pytorch_model.safetensors")
    assert external
    assert external <= stored.keys() <= original.keys()
    assert all(torch.equal(stored[n], original[n]) for n in stored)
    assert sum(len(i.raw_data) for i in graph.initializer) < 4096
    onnx.checker.check_model(str(out / "stage_a.decode.onnx"), full_check=True)
    for text in (str(ROOT), "site-packages"):  # no traces of the exporting machine
        assert text.encode() not in (out / "stage_a.decode.onnx").read_bytes()


def test_a_second_call_adds_and_replaces_only_when_told(
    vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stage = ("--stage", "a", "--checkpoint", vqgan, "--out", out)
    assert command(*stage) == 0
    before = (out / "cascade.json").read_bytes()
    assert command(*stage) == 2
    assert "already has stage a for onnx in fp32; add --overwrite" in capsys.readouterr().err
    (out / "NOTES.txt").write_text("mine")
    (out / "pictures").mkdir()
    (out / "pictures" / "1.png").write_bytes(b"picture")
    assert (out / "cascade.json").read_bytes() == before
    assert (
        command(
            "--stage", "previewer", "--checkpoint", "random:1", "--size", "big", "--precision", "fp32", "--out", out
        )
        == 0
    )
    bundle = Bundle(out)
    assert {"stage_a.decode", "stage_a.encode", "previewer"} == {record.name for record in bundle.manifest.engines}
    assert bundle.manifest.model.source == "vqgan"
    assert command(*stage, "--overwrite", "--no-verify") == 0
    assert Bundle(out).engine("stage_a.decode").verification is None
    assert Bundle(out).engine("previewer").verification is not None
    for name in Bundle(out).manifest.files:
        Bundle(out).file(name)
    assert left_behind(tmp_path) == ["out"]
    assert (out / "NOTES.txt").read_text() == "mine"
    assert (out / "pictures" / "1.png").read_bytes() == b"picture"
    assert {p.name for p in out.iterdir()} == {*Bundle(out).manifest.files, "cascade.json", "NOTES.txt", "pictures"}


def test_precisions_lie_side_by_side(vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    stage = ("--stage", "a", "--checkpoint", vqgan, "--out", out, "--no-verify", "--quiet")
    assert command(*stage) == 0
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert command(*stage, "--precision", "fp16") == 0
    manifest = Bundle(out).manifest
    assert [(r.file, r.precision.name, r.weights) for r in manifest.engines] == [
        ("stage_a.decode.onnx", "fp32", ("stage_a.safetensors",)),
        ("stage_a.decode.fp16.onnx", "fp16", ("stage_a.fp16.safetensors",)),
        ("stage_a.encode.onnx", "fp32", ("stage_a.safetensors",)),
        ("stage_a.encode.fp16.onnx", "fp16", ("stage_a.fp16.safetensors",)),
    ]
    assert manifest.models["stage_a"].weights == "stage_a.safetensors"
    assert all((out / name).read_bytes() == content for name, content in first.items() if name != "cascade.json")
    for name in manifest.files:
        Bundle(out).file(name)
    # the same key is refused, and replaced where it stands
    assert command(*stage, "--precision", "fp16") == 2
    assert "already has stage a for onnx in fp16" in capsys.readouterr().err
    assert command(*stage, "--overwrite") == 0
    assert [r.file for r in Bundle(out).manifest.engines] == [r.file for r in manifest.engines]


def test_a_bundle_holds_one_network_of_a_component(
    tmp_path: Path, vqgan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", out, "--no-verify", "--quiet") == 0
    other = ("--stage", "a", "--checkpoint", "random:1", "--size", "tiny", "--out", out, "--no-verify", "--quiet")
    assert command(*other, "--precision", "fp16") == 2
    error = capsys.readouterr().err
    assert "holds stage_a of vqgan with no LoRA, and this would be of random:1 with no LoRA; add --overwrite" in error
    assert command(*other, "--precision", "fp16", "--overwrite") == 0
    assert "stage_a.decode.onnx: left out, it is of vqgan" in capsys.readouterr().out
    assert {r.precision.name for r in Bundle(out).manifest.engines} == {"fp16"}
    assert {p.name for p in out.iterdir()} == {*Bundle(out).manifest.files, "cascade.json"}


def test_two_exports_into_one_bundle_at_once(vqgan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ["--size", "big", "--precision", "fp32", "--no-verify", "--quiet", "--out", str(out)]
    module = [sys.executable, "-m", "cascade_export.cli"]
    running = [
        subprocess.Popen(
            [*module, "--stage", stage, "--checkpoint", place, *common],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for stage, place in (("a", str(vqgan)), ("previewer", "random:1"))
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert {r.spec.stage for r in Bundle(out).manifest.engines} == {"a", "previewer"}
    assert all(not error or "another export writes to" in error for error in errors)
    assert left_behind(tmp_path) == ["out"]
    assert {p.name for p in out.iterdir()} == {*Bundle(out).manifest.files, "cascade.json"}


def test_a_bundle_of_format_1_is_replaced(vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "cascade.json").write_text('{"format_version": 1, "files": {"old.onnx": {}}, "model": {"size": "tiny"}}')
    for name in ("old.onnx", "NOTES.txt"):
        (out / name).write_text("x")
    stage = ("--stage", "a", "--checkpoint", vqgan, "--no-verify", "--quiet", "--out", out)
    assert command(*stage) == 1
    assert "bundle format 1" in (error := capsys.readouterr().err)
    assert f"cascade-export --stage all --size tiny --overwrite --out {out}" in error
    assert command(*stage, "--overwrite") == 0
    assert {p.name for p in out.iterdir()} == {*Bundle(out).manifest.files, "cascade.json", "NOTES.txt"}


def test_a_manifest_that_could_not_be_read_is_never_written(
    vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporter.describe

    def wrong(*arguments: Any) -> Any:
        made = right(*arguments)
        return with_fields(made, model=with_fields(made.model, height=10**9))

    monkeypatch.setattr(exporter, "describe", wrong)
    with pytest.raises(BundleError, match=r"model\.height"):
        export(open_checkpoint(str(vqgan), None), request(tmp_path / "out", verify=False))
    assert left_behind(tmp_path) == []


def test_weights_and_graphs_are_read_once(vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is loaded once for all that needs it, and no weights file is read again for its hash."""
    loads: list[str] = []
    hashed: list[str] = []
    load, record = exporter.load_fp32, exporter.file_record
    monkeypatch.setattr(exporter, "load_fp32", lambda name, *rest: loads.append(name) or load(name, *rest))
    monkeypatch.setattr(exporter, "file_record", lambda path: hashed.append(path.name) or record(path))
    export(open_checkpoint(str(vqgan), None), request(tmp_path / "out"))
    assert loads == ["stage_a"]
    assert sorted(hashed) == ["stage_a.decode.onnx", "stage_a.encode.onnx"]
    Bundle(tmp_path / "out").file("stage_a.safetensors")


def test_a_bundle_is_a_checkpoint(vqgan: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", first) == 0
    assert command("--stage", "all", "--checkpoint", first, "--out", second) == 0
    assert (first / "stage_a.safetensors").read_bytes() == (second / "stage_a.safetensors").read_bytes()


def test_half_precision_converts_the_weights(vqgan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", out, "--precision", "fp16") == 0
    assert {t.dtype for t in load_file(out / "stage_a.safetensors").values()} == {torch.float16}
    figures = Bundle(out).engine("stage_a.decode").verification
    assert figures is not None
    assert 1e-5 < figures.rel_l2 < 5e-3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--stage", "a", "--checkpoint", "/no/such/place"], 2, "there is no checkpoint at /no/such/place"),
        (["--stage", "c", "--checkpoint", "VQGAN"], 2, "has no stage_c; --stage c needs one"),
        (["--stage", "d"], 2, "invalid choice: 'd'"),
        (["--stage", "a", "--size", "huge"], 2, "invalid choice: 'huge'"),
        (["--stage", "a", "--precision", "int7"], 2, "invalid choice: 'int7'"),
        (["--stage", "a", "--checkpoint", "random:-1"], 2, "write random or random:SEED"),
        ([], 2, "--stage; see cascade-export --help"),
        (["--stage", "a", "--checkpoint", "VQGAN", "--out", "/proc/nothing/here"], 1, "cannot be written"),
        (["--stage", "a", "--checkpoint", "VQGAN", "--out", "FILE"], 2, "exists and is no bundle"),
        (["--stage", "a", "--checkpoint", "VQGAN", "--out=-x"], 2, "begins with a dash"),
        (["--stage", "a", "--checkpoint", "VQGAN", "--out", "y" * 300], 1, "File name too long"),
        (["--stage", "a", "--checkpoint", "VQGAN", "--sm", "9" * 5000], 2, "goes with --target tensorrt-rtx"),
        (["--stage", "a", "--checkpoint", "VQGAN", "--shapes", "batch=" + "9" * 5000], 2, "is not accepted"),
        (["--stage", "a", "--checkpoint", "VQGAN", "--shapes", "\x1b[31mred"], 2, r"'\x1b[31mred' is not accepted"),
        (["--stage", "\x1b[31mred"], 2, r"invalid choice: '\x1b[31mred'"),
    ],
)
def test_bad_requests_are_one_line(
    vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "file").write_text("x")
    names = {"VQGAN": str(vqgan), "FILE": str(tmp_path / "file")}
    arguments = [names.get(a, a) for a in arguments]
    if arguments and not any(a.startswith("--out") for a in arguments):
        arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert "\x1b" not in captured.err
    assert len(captured.err) < 600
    assert message in captured.err
    assert left_behind(tmp_path) == ["file"]


def test_nan_weights_are_named(vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = vqgan / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["up_blocks.1.gammas"][2] = float("nan")
    save_file(state, path)
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", tmp_path / "out") == 1
    assert "up_blocks.1.gammas of the checkpoint holds NaN" in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_values_beyond_half_precision_are_named(
    vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = vqgan / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["up_blocks.1.gammas"][2] = 1e6
    save_file(state, path)
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", tmp_path / "out", "--precision", "fp16") == 1
    assert "use --precision bf16 or fp32" in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_a_wrong_engine_never_gets_its_name(vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that differs from PyTorch: here the reference's sign is flipped."""
    right = exporter.load_fp32

    def wrong(*arguments: Any) -> Any:
        module = right(*arguments)
        module.out_block[0].weight.data.neg_()
        return module

    monkeypatch.setattr(exporter, "load_fp32", wrong)
    with pytest.raises(ExportError, match="from fp32 PyTorch"):
        export(open_checkpoint(str(vqgan), None), request(tmp_path / "out"))
    assert left_behind(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(
    vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights_file, "free_bytes", lambda folder: 100)
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", tmp_path / "out") == 1
    assert "MiB free" in capsys.readouterr().err
    assert left_behind(tmp_path) == []

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(exporter, "save", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export(open_checkpoint(str(vqgan), None), request(tmp_path / "out"))
    assert left_behind(tmp_path) == []


def test_an_unwritable_place_is_one_line(vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", tmp_path / "file" / "out") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_damaged_bundle_is_not_added_to(vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", out) == 0
    (out / "stage_a.encode.onnx").unlink()
    previewer = ("--stage", "previewer", "--checkpoint", "random:1", "--size", "big", "--no-verify", "--out", out)
    assert command(*previewer) == 1
    assert "stage_a.encode.onnx is missing from the bundle" in capsys.readouterr().err
    assert left_behind(tmp_path) == ["out"]
    # what is damaged can be replaced
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", out, "--overwrite", "--no-verify") == 0
    for name in Bundle(out).manifest.files:
        Bundle(out).file(name)


def test_a_link_to_a_bundle_stands_for_the_bundle(vqgan: Path, tmp_path: Path) -> None:
    stage = ("--stage", "a", "--checkpoint", vqgan, "--no-verify")
    assert command(*stage, "--out", tmp_path / "real") == 0
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = Bundle(tmp_path / "real").manifest
    assert command(*stage, "--out", tmp_path / "link", "--overwrite", "--precision", "fp16") == 0
    assert (tmp_path / "link").is_symlink()
    assert len(Bundle(tmp_path / "real").manifest.engines) == 2 * len(before.engines)
    assert left_behind(tmp_path) == ["link", "real"]


def test_the_current_folder_is_a_place_where_it_is_empty(
    vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert command("--stage", "c", "--checkpoint", vqgan, "--out", "deep/er") == 2
    assert list(here.iterdir()) == []
    (here / "mine").write_text("x")
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", ".") == 2
    assert "exists and is no bundle" in capsys.readouterr().err
    (here / "mine").unlink()
    assert command("--stage", "a", "--checkpoint", vqgan, "--no-verify", "--out", ".") == 0
    assert {p.name for p in here.iterdir()} == {*Bundle(here).manifest.files, "cascade.json"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing(tmp_path: Path, number: int) -> None:
    """In the middle of a big export: Stage B, two minutes of work."""
    out = tmp_path / "out"
    arguments = ["--stage", "b", "--size", "small", "--checkpoint", "random:0", "--no-verify", "--out", str(out)]
    code = f"import sys; from cascade_export.cli import main; sys.exit(main({arguments!r}))"
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()):  # the folder beside the bundle's place has appeared: the work has begun
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    running.send_signal(number)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 1
    assert errors == "error: interrupted; nothing half-written was left behind\n"
    assert list(tmp_path.iterdir()) == []


def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    from cascade_export.cli import EXAMPLES, parse_args

    with pytest.raises(SystemExit):
        main(["--help"])
    assert "examples:" in capsys.readouterr().out
    lines = [line.split() for line in EXAMPLES.splitlines() if line.strip().startswith("cascade-export")]
    assert len(lines) >= 3
    for line in lines:
        parse_args(line[1:])


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [(["--size", "big"], "bf16"), (["--size", "tiny"], "fp32"), (["--size", "big", "--precision", "fp16"], "fp16")],
)
def test_without_a_precision_the_size_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], precision: str
) -> None:
    asked: list[ExportRequest] = []

    def keep(checkpoint: Any, request: ExportRequest, report: Any) -> Any:
        asked.append(request)
        return Bundle(default_bundle_path())

    monkeypatch.setattr(exporter, "export", keep)
    assert command("--stage", "c", "--checkpoint", "random:0", *arguments, "--out", tmp_path / "x") == 0
    assert asked[0].precision == PRECISIONS[precision]


def test_bf16_is_verified_on_any_machine(vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing runs bf16, the same graph over the same weights is checked in fp32 arithmetic, and says so."""
    monkeypatch.setattr(exporter, "bf16_provider", lambda precision: None)
    out = tmp_path / "out"
    assert command("--stage", "a", "--checkpoint", vqgan, "--out", out, "--precision", "bf16") == 0
    figures = Bundle(out).engine("stage_a.decode").verification
    assert figures is not None
    assert "fp32 arithmetic over the bf16 weights" in figures.provider
    assert 1e-4 < figures.rel_l2 < 4e-2
    assert {p.name for p in out.iterdir()} == {*Bundle(out).manifest.files, "cascade.json"}
    assert {t.dtype for t in load_file(out / "stage_a.safetensors").values()} == {torch.bfloat16}


# -- every engine has its tests ---------------------------------------------------------------------------------------


def markers() -> Iterator[tuple[str, str]]:
    """Every ``@pytest.mark.covers(engine, kind)`` in the tests."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "covers":
                yield tuple(a.value for a in node.args if isinstance(a, ast.Constant))  # type: ignore[misc]


def test_the_tiny_cascade_exports_as_the_table_says(shipped: Path) -> None:
    jsonschema.validate(json.loads((shipped / "cascade.json").read_text()), SCHEMA)
    for record in Bundle(shipped).manifest.engines:
        graph = onnx.load(shipped / record.file, load_external_data=False).graph
        for values, tensors in ((graph.input, record.spec.inputs), (graph.output, record.spec.outputs)):
            assert [v.name for v in values] == [t.name for t in tensors]
            for value, tensor in zip(values, tensors, strict=True):
                shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
                assert shape == list(tensor.axes)


def test_every_engine_has_parity_and_runtime_tests() -> None:
    """Export tests are parametrized over the table itself (test_trace.py); the others say what they cover."""
    found = set(markers())
    missing = [f"{name}: {kind}" for name in ENGINES for kind in ("parity", "runtime") if (name, kind) not in found]
    assert not missing, f"engines without tests (mark them with pytest.mark.covers): {missing}"
    assert {name for name, _ in found} <= set(ENGINES)


def test_the_coverage_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "stage_d.step", ENGINES["stage_c.step"])
    with pytest.raises(AssertionError, match=r"stage_d\.step: parity"):
        test_every_engine_has_parity_and_runtime_tests()


def test_exports_are_reproducible(vqgan: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(open_checkpoint(str(vqgan), None), request(tmp_path / name, verify=False))
    for file in ("stage_a.decode.onnx", "stage_a.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
