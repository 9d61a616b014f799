"""``cascade-bench``: rows that can be trusted, and reasons where there is none."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from cascade_bench import cli, jobs, peers, race, report, roofline
from cascade_bench.jobs import OURS, Job
from cascade_rt import loop
from cascade_rt.bundle import find_bundle

# what the contract promises of every row
KEYS = {
    *("what", "size", "peer", "provider", "precision", "batch", "pixels", "repeats", "median_s", "p10_s", "p90_s"),
    *("ratio_to_eager", "peak_mib", "load_s", "first_s", "rel_error", "roofline_share", "skipped"),
}


def job(what: str, peer: str = OURS, **changes: Any) -> Job:
    made = Job(
        what=what,
        peer=peer,
        provider="cpu",
        precision="fp32",
        size="tiny",
        batch=1,
        pixels=64,
        steps=(2, 1),
        bundle=str(find_bundle(None).path),
        threads=1,
    )
    return replace(made, **changes)


def run(*rivals: Job, repeats: int = 2) -> list[race.Row]:
    return race.run(rivals, {}, [None] * len(rivals), repeats, limit=300, quiet=True)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run of the command: Stage A and a picture of two steps."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["--stage", "a", "--stage", "picture", "--steps", "2,1", "--repeat", "2", "--threads", "1", "--quiet"]
    files = ["--json", str(folder / "r.json"), "--plot", str(folder / "r.png"), "--work", str(folder)]
    assert cli.main([*words, *files]) == 0
    assert (folder / "r.png").stat().st_size > 5000
    read: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return read


def test_a_run_says_what_it_ran_on_and_has_every_column(result: dict[str, Any]) -> None:
    assert result["machine"]["threads"] == 1
    assert {"python", "torch", "diffusers", "onnxruntime"} <= result["versions"].keys()
    assert all(row.keys() >= KEYS for row in result["rows"])
    assert [(r["what"], r["peer"]) for r in result["rows"]] == [
        (what, peer) for what in ("stage_a.decode", "picture") for peer in ("eager", OURS)
    ]


def test_both_sides_compute_the_same(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert row["skipped"] is None
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"]
        assert 10 < row["own_mib"] < row["peak_mib"] < 4000
        if row["peer"] == OURS:
            # fp32 on both sides: another picture, other weights or another sampler would be of the order of one
            assert 0 < row["rel_error"] < 1e-4
    eager, ours = (
        next(r for r in result["rows"] if r["what"] == "picture" and r["peer"] == p) for p in ("eager", OURS)
    )
    assert ours["ratio_to_eager"] == pytest.approx(eager["median_s"] / ours["median_s"])
    assert eager["ratio_to_eager"] == 1


def test_shares_of_the_roofline_are_the_least_time_over_the_time_taken(result: dict[str, Any]) -> None:
    """From the roof in the result and from operations that are counted here, on the exported graph."""
    roof = roofline.Roof(**result["roofline"]["cpu"])
    operations = graph_operations("stage_a.decode", {"batch": 1, "height": 64, "width": 64})
    rows = [row for row in result["rows"] if row["what"] == "stage_a.decode"]
    assert [row["pixels"] for row in rows] == [256, 256]
    for row in rows:
        assert row["roofline_share"] == pytest.approx(operations / roof.flops["fp32"] / row["median_s"], rel=0.01)
    assert all(row["roofline_share"] is None for row in result["rows"] if row["what"] == "picture")


@pytest.mark.parametrize("what", ["stage_c.step", "stage_b.step", "text_encoder"])
def test_one_call_of_every_network_matches_eager(what: str) -> None:
    eager, ours = run(job(what, "eager", batch=2), job(what, batch=2), repeats=1)
    assert (eager.skipped, ours.skipped) == (None, None)
    assert eager.rel_error is None
    assert ours.rel_error is not None
    assert ours.rel_error < 2e-5


def test_a_row_without_eager_beside_it_still_has_its_error() -> None:
    (ours,) = run(job("stage_a.decode"), repeats=1)
    assert ours.rel_error is not None
    assert ours.rel_error < 2e-5
    assert ours.ratio_to_eager is None


def test_half_precision_is_compared_with_the_fp32_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped ones for tiny, wherever the bundle in half precision lies; of random weights, those of its folder."""
    elsewhere = tmp_path / "tiny-fp16"
    elsewhere.symlink_to(find_bundle(None).path)
    (ours,) = run(job("stage_a.decode", precision="fp16", bundle=str(elsewhere)), repeats=1)
    assert ours.rel_error is not None
    (ours,) = run(job("stage_a.decode", precision="fp16", bundle=str(elsewhere), size="small"), repeats=1)
    assert ours.rel_error is None
    assert "cascade-export --stage all --size small --precision fp32" in capsys.readouterr().err


def test_an_absent_provider_is_a_row_with_its_reason() -> None:
    ours, cuda = run(job("stage_a.decode"), job("stage_a.decode", provider="tensorrt"), repeats=1)
    assert ours.median_s is not None
    assert cuda.median_s is None
    assert "tensorrt" in str(cuda.skipped)


def test_a_process_that_dies_or_hangs_is_a_row_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.sh"
    monkeypatch.setattr(sys, "executable", str(script))
    for text, reason in (("kill -9 $$", "exit status -9"), ("exec sleep 60", "more than 1 s")):
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        with pytest.raises(race.RacerError, match=reason):
            race.start(job("stage_a.decode"), tmp_path / "none.npz", tmp_path, limit=1)


def test_contexts_are_timed_for_us_alone() -> None:
    eager, ours = run(job("stage_c.context", "eager", batch=2), job("stage_c.context", batch=2), repeats=1)
    assert "inside every step" in str(eager.skipped)
    assert ours.median_s is not None
    assert ours.rel_error is None


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_the_host_share_of_a_loop_is_measured(provider: str) -> None:
    if provider == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    (row,) = run(job(jobs.HOST, batch=2, provider=provider), repeats=1)
    assert row.skipped is None
    assert row.host_share is not None
    assert 0 < row.host_share < 0.9
    assert row.steps == (2, 1)


PAUSE = 0.2


def slowed(work: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        time.sleep(PAUSE)
        return work(*args, **options)

    return run


def host_loop(steps: int) -> peers.OurPriorLoop:
    asked = job(jobs.HOST, batch=2, steps=(steps, 1))
    made = peers.OurPriorLoop(asked, jobs.draw(find_bundle(None), jobs.HOST, 2, 64))
    made.call()  # the first call loads the engines
    made.call()
    return made


@pytest.fixture
def original_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is watched replaces these methods; the test ends with those of ONNX Runtime."""
    for name in ("run_with_ort_values", "run_with_iobinding"):
        monkeypatch.setattr(onnxruntime.InferenceSession, name, getattr(onnxruntime.InferenceSession, name))


@pytest.mark.usefixtures("original_calls")
def test_the_host_share_grows_with_the_hosts_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "denoise_step", slowed(loop.denoise_step))
    # two steps, each with a pause of the host, beside engines that take milliseconds
    assert host_loop(2).extras()["host_share"] > 0.8


@pytest.mark.usefixtures("original_calls")
def test_the_host_share_does_not_count_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    session = onnxruntime.InferenceSession
    for name in ("run_with_ort_values", "run_with_iobinding"):
        monkeypatch.setattr(session, name, slowed(getattr(session, name)))
    # the context and two steps, each with a pause in the engine, beside a host that takes milliseconds
    assert host_loop(2).extras()["host_share"] < 0.2


def test_a_host_share_without_a_call_of_an_engine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.OurPriorLoop, "_watch_engines", lambda self: None)
    with pytest.raises(RuntimeError, match="no call of the runtime was seen"):
        host_loop(1).extras()


def test_error_is_taken_in_float64_and_refuses_what_is_not_finite() -> None:
    a = np.full(10, 1e8, np.float32)
    b = a.copy()
    b[0] += 8
    assert race.relative_error(b, a) == pytest.approx(8 / (1e8 * np.sqrt(10)))
    b[0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        race.relative_error(b, a)
    with pytest.raises(ValueError, match="shape"):
        race.relative_error(a[:3], a)


def graph_operations(engine: str, sizes: dict[str, int]) -> float:
    """Floating-point operations of the products and convolutions in an engine's ONNX graph, for named sizes.

    Shapes are those that ONNX Runtime makes: an independent count, which knows nothing of the network's definition.
    """
    bundle = find_bundle(None)
    record = bundle.engine(engine, "onnx")
    with tempfile.TemporaryDirectory() as folder:  # onnx reads no weights from a file that has several names
        for name in record.files:
            shutil.copy(bundle.path / name, folder)
        graph = onnx.load(Path(folder) / record.file)
    inner = {name for node in graph.graph.node for name in node.output}
    there = {value.name for value in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(inner - there))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    feeds = {t.name: np.zeros(t.shape(sizes), t.dtype) for t in record.spec.inputs}
    names = [output.name for output in session.get_outputs()]
    shapes = dict(zip(names, (np.shape(x) for x in session.run(names, feeds)), strict=True))
    shapes |= {name: x.shape for name, x in feeds.items()}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    operations = 0.0
    for node in graph.graph.node:
        made = math.prod(shapes[node.output[0]]) if node.output else 0
        if node.op_type == "MatMul":
            operations += 2 * made * shapes[node.input[0]][-1]
        elif node.op_type == "Gemm":
            transposed = next((a.i for a in node.attribute if a.name == "transA"), 0)
            operations += 2 * made * shapes[node.input[0]][0 if transposed else 1]
        elif node.op_type == "Conv":
            operations += 2 * made * math.prod(shapes[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":
            operations += 2 * math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])
    return operations


@pytest.mark.parametrize(
    ("what", "sizes"),
    [
        ("stage_c.step", {"batch": 2, "height": 6, "width": 6, "steps": 1, "condition_tokens": 32}),
        ("stage_b.step", {"batch": 2, "height": 64, "width": 64, "steps": 1}),
        ("stage_a.decode", {"batch": 2, "height": 64, "width": 64}),
    ],
)
def test_work_is_what_the_exported_graph_asks_for(what: str, sizes: dict[str, int]) -> None:
    """So what is the same for all steps is not in a step's work."""
    work = roofline.count(job(what, batch=2, pixels=256))
    assert work is not None
    assert work.flops == graph_operations(what, sizes)


def test_the_weights_of_a_step_are_those_that_its_graph_reads() -> None:
    bundle = find_bundle(None)
    for stage in ("stage_c", "stage_b"):
        work = roofline.count(job(f"{stage}.step", batch=2, pixels=256))
        graph = onnx.load(bundle.path / bundle.engine(f"{stage}.step", "onnx").file, load_external_data=False)
        read = sum(math.prod(tensor.dims) for tensor in graph.graph.initializer if tensor.external_data)
        assert work is not None
        assert work.parameters == pytest.approx(read, rel=0.01)


def test_the_least_time_is_that_of_the_operations_or_of_the_weights_bytes() -> None:
    work = roofline.Work(flops=6e9, parameters=1e9)
    roof = roofline.Roof(flops={"fp32": 3e9, "bf16": 1e18, "int8": 1e18}, bytes=4e9)
    assert work.seconds(roof, "fp32") == pytest.approx(2)
    assert work.seconds(roof, "bf16") == pytest.approx(0.5)  # two bytes a weight
    assert work.seconds(roof, "int8") == pytest.approx(0.25)  # one byte
    assert work.seconds(roof, "fp16") is None
    assert roofline.count(job(jobs.PICTURE)) is None


def test_int8_has_no_rival_of_its_own_and_is_compared_with_bf16_or_fp32(tmp_path: Path) -> None:
    words = ["--stage", "c", "--precision", "fp32,bf16,int8", "--peer", "eager"]
    asked = cli.make_jobs(cli.make_parser().parse_args(words), ["c"], dict.fromkeys(("fp32", "bf16", "int8"), "bundle"))
    steps = [j for j in asked if j.what == "stage_c.step"]
    assert {j.precision for j in steps if j.peer == "eager"} == {"fp32", "bf16"}
    assert {j.precision for j in steps if j.peer == OURS} == {"fp32", "bf16", "int8"}
    seconds = {("eager", "fp32"): 12.0, ("eager", "bf16"): 6.0, (OURS, "fp32"): 8.0, (OURS, "int8"): 3.0}
    rows = {
        j: replace(race._blank(j), median_s=seconds[j.peer, j.precision])
        for j in steps
        if (j.peer, j.precision) in seconds
    }
    compared = race._compare(dict(rows), {}, tmp_path / "feeds.npz", tmp_path, limit=1)
    ratios = {(j.peer, j.precision): row.ratio_to_eager for j, row in compared.items()}
    assert ratios == {("eager", "fp32"): 1, ("eager", "bf16"): 1, (OURS, "fp32"): 1.5, (OURS, "int8"): 2}
    without = {j: row for j, row in rows.items() if (j.peer, j.precision) != ("eager", "bf16")}
    compared = race._compare(without, {}, tmp_path / "feeds.npz", tmp_path, limit=1)
    assert next(r.ratio_to_eager for j, r in compared.items() if j.precision == "int8") == 4


def test_engines_on_the_cpu_share_its_roofline_whatever_runs_them() -> None:
    """OpenVINO alone, with no rival beside it, is measured against the CPU in its own precision."""
    jobs_asked = [job("stage_a.decode", provider="openvino", precision="bf16")]
    roofs, (work,) = roofline.ask(jobs_asked, [j.device for j in jobs_asked], threads=1)
    assert roofs.keys() == {"cpu"}
    assert roofs["cpu"].flops.keys() == {"bf16"}
    assert work is not None
    assert work.seconds(roofs["cpu"], "bf16") is not None


def test_the_table_keeps_losing_and_skipped_rows() -> None:
    won = race.Row(
        what="stage_c.step",
        size="small",
        peer=OURS,
        provider="cpu",
        precision="fp32",
        batch=2,
        pixels=1024,
        median_s=1.5,
        p10_s=1.4,
        p90_s=1.6,
    )
    lost = replace(won, median_s=30.0, p10_s=29.0, p90_s=31.0, ratio_to_eager=0.31, rel_error=1.2e-6)
    gone = replace(won, peer="compile", median_s=None, skipped="no compiler")
    text = report.table([asdict(row) for row in (won, lost, gone)])
    assert len(text.splitlines()) == 5
    assert "0.31" in text
    assert "skipped: no compiler" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peer", "nobody"], "nobody"),
        (["--provider", "abacus"], "abacus"),
        (["--batch", "0"], "'0' is not accepted"),
        (["--repeat", "0"], "--repeat 0"),
        (["--steps", "20"], "--steps takes two numbers"),
        (["--pixels", "63"], "'63'"),
        (["--json", "/"], "is a folder"),
    ],
)
def test_wrong_requests_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
