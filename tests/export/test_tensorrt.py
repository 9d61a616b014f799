"""Engine files that TensorRT-RTX builds, for which it needs no GPU; and every refusal before and during a build."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper

from cascade_export import engine_files, targets
from cascade_export.checkpoints import open_checkpoint
from cascade_export.cli import main
from cascade_export.engine_files import Graph, build_engine_file
from cascade_export.exporter import export
from cascade_export.job import ExportRequest, own_precision
from cascade_export.targets import ONNX, BuildTarget, check_precision, resolve_targets
from cascade_rt.backends.cuda import gpu_sm
from cascade_rt.bundle import Bundle
from cascade_rt.errors import BundleError, CheckpointError, EngineError, ExportError, RequestError
from cascade_rt.manifest import EngineRecord, Target
from cascade_rt.profiles import DEFAULT_SHAPES, narrow
from cascade_rt.stages import ENGINES, PRECISIONS, EngineSpec, tensor_row

has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not has_rtx, reason="tensorrt-rtx is not installed")
THREE = BuildTarget("tensorrt-rtx", (86, 89, 120))
ONE = BuildTarget("tensorrt-rtx", (89,))
TINY_ENGINES = {name for name, spec in ENGINES.items() if spec.stage in ("c", "b", "a", "text")}


def make(
    folder: Path, precision: str, *targets: BuildTarget, stages: tuple[str, ...] = ("a",), seed: int = 0
) -> Bundle:
    request = ExportRequest(
        stages=stages, precision=PRECISIONS[precision], out=folder, verify=False, quiet=True, targets=targets
    )
    return export(open_checkpoint(f"random:{seed}", "tiny"), request)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of Stage A's graphs; tests work on copies."""
    return make(tmp_path_factory.mktemp("graphs") / "bundle", "fp16", ONNX).path


@pytest.fixture
def bundle(graphs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(graphs, tmp_path / "bundle"))


def built_files(bundle: Bundle) -> list[EngineRecord]:
    return [record for record in bundle.manifest.engines if record.runtime != "onnx"]


# -- builds ---------------------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_tiny_engine_builds_for_three_gpus(precision: str, tmp_path: Path) -> None:
    lines: list[str] = []
    request = ExportRequest(
        stages=("c", "b", "a", "text"),
        precision=PRECISIONS[precision],
        out=tmp_path / "bundle",
        verify=False,
        quiet=True,
        targets=(THREE,),
    )
    bundle = export(open_checkpoint("random:0", "tiny"), request, lines.append)
    records = built_files(bundle)
    assert {record.name for record in records} == TINY_ENGINES
    assert len([line for line in lines if "built in" in line]) == len(TINY_ENGINES)
    version = importlib.import_module("tensorrt_rtx").__version__
    for record in records:
        assert record.file == f"{record.name}.rtx-sm86-sm89-sm120.engine"
        assert record.sm == (86, 89, 120)
        assert (record.precision.name, record.weights, record.verification) == (precision, (), None)
        assert record.target is not None
        assert record.target.version == version
        assert "REQUIRE_USER_ALLOCATION" in record.target.flags
        assert all(limits.accepts(limits.opt) for limits in record.ranges.values())
        content = bundle.file(record.file).read_bytes()
        assert len(content) > 100_000
    # engine files hold their weights, and what they were built from is not kept
    assert sorted(p.suffix for p in bundle.path.iterdir()) == sorted(
        [".engine"] * len(TINY_ENGINES) + [".json", ".json"]
    )
    assert all(model.weights is None for model in bundle.manifest.models.values())
    with pytest.raises(CheckpointError, match=r"only as TensorRT engine files.*--checkpoint \(random:0\)"):
        open_checkpoint(str(bundle.path), None).network("stage_c")


@needs_rtx
def test_fp32_builds_too(tmp_path: Path) -> None:
    records = built_files(make(tmp_path / "bundle", "fp32", ONE))
    assert {r.name for r in records} == {"stage_a.decode", "stage_a.encode"}
    assert all("TF32" not in record.target.flags for record in records if record.target)


@needs_rtx
def test_engine_files_are_added_from_the_bundles_own_graphs(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--stage", "a", "--target", "tensorrt-rtx", "--sm", "89", "--out", str(bundle), "--quiet"]
    assert main(command) == 0
    assert "the bundle's own fp16 graphs" in capsys.readouterr().out
    opened = Bundle(bundle)
    assert [r.runtime for r in opened.manifest.records("stage_a.decode")] == ["onnx", "tensorrt-rtx"]
    assert opened.engine("stage_a.decode").runtime == "onnx"
    built = opened.engine("stage_a.decode", "tensorrt-rtx")
    graph = opened.engine("stage_a.decode", "onnx")
    assert built.target is not None
    hashes = [opened.manifest.files[name].sha256 for name in graph.files]
    assert [built.target.graph_sha256, *built.target.weights_sha256] == hashes
    assert main(command) == 2
    assert "already has stage a for tensorrt-rtx sm89 in fp16; add --overwrite" in capsys.readouterr().err
    assert main([*command[:5], "86", *command[6:]]) == 0
    assert len(Bundle(bundle).manifest.records("stage_a.decode")) == 3


@needs_rtx
def test_engine_files_of_replaced_graphs_are_left_out(bundle: Path) -> None:
    assert main(["--stage", "a", "--target", "tensorrt-rtx", "--sm", "89", "--out", str(bundle), "--quiet"]) == 0
    lines: list[str] = []
    request = ExportRequest(
        stages=("a",), precision=PRECISIONS["fp16"], out=bundle, verify=False, overwrite=True, quiet=True
    )
    export(open_checkpoint("random:1", "tiny"), request, lines.append)
    assert built_files(Bundle(bundle)) == []
    assert any("left out, it is of random:0 with no LoRA" in line for line in lines)
    assert not list(bundle.glob("*.engine"))


# -- bad input ------------------------------------------------------------------------------------------------------


@needs_rtx
def test_a_damaged_engine_file_is_refused(bundle: Path) -> None:
    assert main(["--stage", "a", "--target", "tensorrt-rtx", "--sm", "89", "--out", str(bundle), "--quiet"]) == 0
    record = Bundle(bundle).engine("stage_a.decode", "tensorrt-rtx")
    path = bundle / record.file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"is damaged: its hash is not the manifest's"):
        Bundle(bundle).file(record.file)


def test_the_manifest_holds_one_engine_file_a_gpu(bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    graph = manifest.records("stage_a.decode")[0]
    target = Target(sm=(89,), version="11", profile={}, flags=(), graph_sha256="0" * 64, weights_sha256=())
    built = replace(graph, runtime="tensorrt", weights=(), target=target)
    twice = replace(manifest, engines=(*manifest.engines, built, built))
    with pytest.raises(BundleError, match=r"lists the engine stage_a.decode fp16 tensorrt sm89 twice"):
        type(manifest).from_json(twice.to_json(), "cascade.json")
    once = replace(manifest, engines=(built, *manifest.engines))
    again = type(manifest).from_json(once.to_json(), "cascade.json")
    assert [r.runtime for r in again.records("stage_a.decode")] == ["onnx", "tensorrt"]
    assert again.to_json() == once.to_json()


@needs_rtx
@pytest.mark.parametrize("text", ["90", "abc", "8.9", "86,,89", "", "-1", "9" * 5000, "²", "\x1b[31m"])
def test_unknown_sm(text: str) -> None:
    with pytest.raises(RequestError, match=r"is not accepted; TensorRT-RTX builds for 75, 80, 86, 89, 120, 121"):
        resolve_targets(["tensorrt-rtx"], text)


@needs_rtx
def test_sm_is_sorted_and_has_a_default() -> None:
    assert resolve_targets(["onnx", "tensorrt-rtx", "onnx"], "120,86,86") == (
        ONNX,
        BuildTarget("tensorrt-rtx", (86, 120)),
    )
    assert resolve_targets(["tensorrt-rtx"], None)[0].sm == targets.DEFAULT_SM


def test_sm_without_its_target() -> None:
    with pytest.raises(RequestError, match=r"--sm '89' goes with --target tensorrt-rtx"):
        resolve_targets(["onnx"], "89")


@pytest.mark.parametrize(("precision", "reason"), [("bf16", "no bfloat16"), ("fp32", "no fp32 matrix product")])
def test_turing_takes_fp16_only(precision: str, reason: str) -> None:
    with pytest.raises(RequestError, match=rf"--sm 75 cannot be built in {precision}.*{reason}.*--precision fp16"):
        check_precision(BuildTarget("tensorrt-rtx", (75, 89)), PRECISIONS[precision])
    check_precision(BuildTarget("tensorrt-rtx", (75, 89)), PRECISIONS["fp16"])
    check_precision(BuildTarget("tensorrt-rtx", (80, 89)), PRECISIONS[precision])


@needs_rtx
def test_refusals_on_the_command_line_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    command = [
        "--stage",
        "a",
        "--checkpoint",
        "random:0",
        "--size",
        "tiny",
        "--out",
        str(out),
        "--no-verify",
        "--quiet",
    ]
    rtx = ["--target", "tensorrt-rtx"]
    for extra, message in (
        ([*rtx, "--sm", "75", "--precision", "bf16"], "--sm 75 cannot be built in bf16"),
        ([*rtx, "--sm", "91"], "--sm '91' is not accepted"),
        ([*rtx, "--shapes", "huge"], "--shapes 'huge' is not accepted"),
        (["--sm", "89"], "--sm '89' goes with --target tensorrt-rtx"),
    ):
        assert main([*command, *extra]) == 2, extra
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_shapes_that_do_not_fit_are_refused_before_the_build(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in bundle.parent.rglob("*"))
    command = ["--stage", "a", "--target", "tensorrt-rtx", "--shapes", "stage_a.decode.height=2:64:4096"]
    assert main([*command, "--out", str(bundle), "--quiet"]) == 2
    assert "height=2:64:4096 does not fit stage_a.decode, which takes height 2..1024" in capsys.readouterr().err
    assert sorted(p.name for p in bundle.parent.rglob("*")) == before


def test_tensorrt_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(EngineError):  # which is what `gpu_sm` raises where there is none, as is wanted here
        pytest.skip(f"this machine has a GPU of SM {gpu_sm()}")
    command = ["--stage", "a", "--checkpoint", "random:0", "--size", "tiny", "--target", "tensorrt"]
    assert main([*command, "--out", str(tmp_path / "bundle")]) == 1
    error = capsys.readouterr().err
    assert "--target tensorrt builds on the GPU that will run the engine file: there is no NVIDIA GPU here" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "gpu_sm", lambda: 89)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for target in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(RequestError, match=rf"pip install 'cascade-rt\[{target}\]'"):
            resolve_targets([target], None)


# -- builds that do not end well ------------------------------------------------------------------------------------


def build(bundle: Path, target: BuildTarget, **options: object) -> Path:
    opened = Bundle(bundle)
    record = opened.engine("stage_a.decode", "onnx")
    path = bundle / f"stage_a.decode.{target.suffix}"
    (spec,) = narrow([record.spec], DEFAULT_SHAPES, opened.manifest.model)
    graph = Graph(record=record, folder=bundle, hashes=("0" * 64, ()))
    build_engine_file(target, graph, spec, path, **options)  # type: ignore[arg-type]
    return path


@needs_rtx
def test_an_interrupted_build_leaves_nothing(bundle: Path) -> None:
    before = sorted(p.name for p in bundle.iterdir())

    def interrupt(phase: str, step: int, of: int) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build(bundle, ONE, progress=interrupt)
    assert time.monotonic() - started < engine_files.STOP_SECONDS
    assert sorted(p.name for p in bundle.iterdir()) == before


@needs_rtx
def test_ctrl_c_stops_the_command(bundle: Path) -> None:
    before = sorted(p.name for p in bundle.parent.rglob("*"))
    code = (
        "import os, signal, sys\n"
        "from cascade_export import engine_files\n"
        "def interrupt(phase, step, of): os.kill(os.getpid(), signal.SIGINT)\n"
        "run = engine_files._run\n"
        "engine_files._run = lambda order, progress: run(order, interrupt)\n"
        "from cascade_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["--stage", "a", "--target", "tensorrt-rtx", "--sm", "89", "--out", str(bundle), "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr == "error: interrupted; nothing half-written was left behind\n"
    assert sorted(p.name for p in bundle.parent.rglob("*")) == before


@needs_rtx
def test_a_builder_whose_owner_has_died_stops(bundle: Path) -> None:
    """The building process sees the end of its input and cancels, whatever became of the process that started it."""
    graph = Bundle(bundle).engine("stage_a.decode", "onnx")
    order = {
        "module": "tensorrt_rtx",
        "graph": str(bundle / graph.file),
        "engine_file": str(bundle / "built"),
        "profile": {"latents": [[1, 4, 8, 8], [1, 4, 8, 8], [1, 4, 8, 8]]},
        "sm": [89],
        "exact": False,
        "timing_cache": None,
    }
    module = [sys.executable, "-m", "cascade_export.tensorrt_build"]
    # input ends right after the order
    done = subprocess.run(
        module, input=json.dumps(order) + "\n", capture_output=True, text=True, check=False, timeout=60
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"cancelled": True}, done.stdout + done.stderr
    assert not (bundle / "built").exists()


@needs_rtx
def test_a_failed_build_does_not_spoil_the_next(bundle: Path, tmp_path: Path) -> None:
    bf16 = make(tmp_path / "bf16", "bf16", ONNX).path
    turing = BuildTarget("tensorrt-rtx", (75,))
    with pytest.raises(ExportError, match=r"stage_a.decode cannot be built for tensorrt-rtx sm75: \w+"):
        build(bf16, turing)
    assert not list(bf16.glob("*.engine")) + list(bf16.glob(".*"))
    assert build(bf16, ONE).stat().st_size > 0
    assert build(bundle, turing).stat().st_size > 0


@needs_rtx
def test_parser_errors_name_node_and_operator(tmp_path: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="the_odd_one", domain="nowhere")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "odd", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)],
    )
    onnx.save(model, tmp_path / "odd.onnx")
    tensor = tensor_row("x", "float32", "1 4", "")
    spec = EngineSpec(name="previewer", stage="previewer", model="previewer", inputs=(tensor,), outputs=(tensor,))
    record = EngineRecord.of(spec, precision=PRECISIONS["fp16"], runtime="onnx", file="odd.onnx", weights=(), tools={})
    graph = Graph(record=record, folder=tmp_path, hashes=("0" * 64, ()))
    with pytest.raises(ExportError, match=r"odd.onnx cannot be parsed: node the_odd_one \(Frobnicate\): "):
        build_engine_file(ONE, graph, spec, tmp_path / "odd.engine")
    assert [p.name for p in tmp_path.iterdir()] == ["odd.onnx"]


def test_a_builder_that_is_killed_is_reported(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import os, sys; sys.stdin.readline(); os.kill(os.getpid(), {int(signal.SIGKILL)})"
    real = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[str]:
        return real([sys.executable, "-c", code], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(engine_files.subprocess, "Popen", start)
    with pytest.raises(ExportError, match="was killed, most likely because memory ran out"):
        build(bundle, ONE)
    assert not list(bundle.glob("*.engine")) + list(bundle.glob(".*"))


def test_own_precision(bundle: Path) -> None:
    opened = Bundle(bundle)
    assert own_precision(opened.manifest, ("a",)) == PRECISIONS["fp16"]
    assert own_precision(opened.manifest, ("a", "c")) is None


def test_a_builder_says_why_it_ended(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets.MODULES, "tensorrt-rtx", "no_such_module")
    with pytest.raises(ExportError, match=r"ended with status 1: ModuleNotFoundError.*no_such_module"):
        build(bundle, ONE)
