"""Graph -> TensorRT engine file, for TensorRT (on the GPU that will run it) and TensorRT-RTX (without a GPU).

Networks are strongly typed: an engine file computes in the precision that its graph was exported in. `tensorrt_build`
makes the calls, in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

import cascade_rt
from cascade_rt.bundle import file_record
from cascade_rt.commands import check_interrupt
from cascade_rt.errors import ExportError
from cascade_rt.manifest import EngineRecord, FileRecord, ModelFacts, Target
from cascade_rt.paths import cache_dir
from cascade_rt.profiles import Shapes, narrow, profile
from cascade_rt.stages import EngineSpec

from .job import Report
from .targets import MODULES, BuildTarget
from .tensorrt_build import BuildOrder, Message

STOP_SECONDS = 25.0
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph that engine files are built from.

    Attributes:
        record: of the graph.
        folder: where it and its weights lie.
        hashes: SHA-256 of the graph and of its weights files.
    """

    record: EngineRecord
    folder: Path
    hashes: tuple[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine file that was built.

    Attributes:
        record: for the manifest.
        file: its size and hash.
        seconds: from loading the builder to the written file.
        peak_mib: largest resident size of the process that built it; None where the system does not say.
    """

    record: EngineRecord
    file: FileRecord
    seconds: float
    peak_mib: int | None


def fitted(
    graphs: Sequence[Graph], shapes: Shapes, facts: ModelFacts, grids: tuple[int, int]
) -> list[tuple[Graph, EngineSpec]]:
    """Every graph with the sizes that its engine files shall take.

    Args:
        graphs: of whole stages.
        shapes: what ``--shapes`` asks for.
        facts: picture size and compressions.
        grids: what height and width of Stage C's and of Stage B's latents must be multiples of.

    Raises:
        RequestError: the shapes do not fit.
    """
    specs = narrow([graph.record.spec for graph in graphs], shapes, facts, grids)
    return list(zip(graphs, specs, strict=True))


def build_engine_files(
    graphs: Sequence[tuple[Graph, EngineSpec]],
    target: BuildTarget,
    name_of: Callable[[EngineRecord, BuildTarget], str],
    folder: Path,
    quiet: bool,
    report: Report,
) -> list[Built]:
    """Build the engine files of graphs for one target.

    Args:
        graphs: from `fitted`.
        target: from `targets.resolve_targets`.
        name_of: gives the file of a graph's engine file.
        folder: to write to.
        quiet: no progress bar.
        report: gets a line for every file.

    Raises:
        ExportError: one cannot be built.
    """
    made = []
    for graph, spec in graphs:
        file = name_of(graph.record, target)
        with _bar(file, quiet) as show:
            built = build_engine_file(target, graph, spec, folder / file, show)
        made.append(built)
        memory = "" if built.peak_mib is None else f"; the builder took {built.peak_mib} MiB"
        size = built.file.bytes / 2**20
        report(f"{file}: built in {built.seconds:.1f} s, {size:.1f} MiB{memory}; not verified on a GPU")
    return made


def build_engine_file(
    target: BuildTarget,
    graph: Graph,
    spec: EngineSpec,
    path: Path,
    progress: Progress = lambda phase, step, of: None,
) -> Built:
    """Build one engine file.

    Args:
        target: from `targets.resolve_targets`.
        graph: what it is built from.
        spec: the engine with the ranges that it shall take, from `fitted`.
        path: file to write; it appears when the engine file is whole.
        progress: called with a phase, its step and its number of steps.

    Raises:
        ExportError: the graph does not parse or the engine file cannot be built.
        KeyboardInterrupt: after the build has been stopped, nothing being left of it.
    """
    beside = path.with_name(f".{path.name}.partial")
    module, cache = MODULES[target.runtime], None
    if target.runtime == "tensorrt":  # TensorRT-RTX tunes on the user's GPU, at run time, and times nothing here
        version = importlib.import_module(module).__version__
        cache = str(cache_dir() / "tensorrt" / f"timing-{version}-sm{target.sm[0]}.cache")
    shapes = profile(spec)
    order: BuildOrder = {
        "module": module,
        "graph": str(graph.folder / graph.record.file),
        "engine_file": str(beside),
        "profile": shapes,
        "sm": list(target.sm) if target.runtime == "tensorrt-rtx" else [],
        "exact": graph.record.precision.compute == "float32" and graph.record.precision.linear == "plain",
        "timing_cache": cache,
    }
    try:
        done = _run(order, progress)
        if "error" in done:
            raise ExportError(f"{spec.name} cannot be built for {target}: {done['error']}")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    record = EngineRecord.of(
        spec,
        precision=graph.record.precision,
        runtime=target.runtime,
        file=path.name,
        weights=(),
        tools={"cascade-rt": cascade_rt.__version__, target.runtime: done["version"]},
        target=Target(
            sm=target.sm,
            version=done["version"],
            profile=dict(shapes),
            flags=tuple(done["flags"]),
            graph_sha256=graph.hashes[0],
            weights_sha256=graph.hashes[1],
        ),
    )
    return Built(record=record, file=file_record(path), seconds=done["seconds"], peak_mib=done["peak_mib"])


def _run(order: BuildOrder, progress: Progress) -> Message:
    """Build in a process of its own and wait for its last message."""
    with tempfile.TemporaryFile() as errors:
        # a session of its own: Ctrl-C comes here, and the build is told to stop by the end of its input
        child = subprocess.Popen(
            [sys.executable, "-m", "cascade_export.tensorrt_build"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(order) + "\n")
            child.stdin.flush()
            for line in child.stdout:
                message: Message = json.loads(line)
                if "phase" in message:
                    progress(message["phase"], message["step"], message["of"])
                else:
                    child.wait()
                    return message
            return {"error": _last_words(child.wait(), errors)}
        except BrokenPipeError:
            return {"error": _last_words(child.wait(), errors)}
        finally:
            _stop(child)


def _stop(child: subprocess.Popen[Any]) -> None:
    """End a build that is still running: ask, wait, and only then kill."""
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already
        child.stdin.close()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()


def _last_words(code: int, errors: IO[bytes]) -> str:
    """Why a process ended without a message."""
    if code == -9:
        return "the building process was killed, most likely because memory ran out"
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f"the building process ended with status {code}" + (f": {lines[-1]}" if lines else "")


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Progress]:
    """A bar that shows the builder's phases one after the other."""
    with tqdm(desc=f"build {what}", leave=False, disable=True if quiet else None) as bar:

        def show(phase: str, step: int, of: int) -> None:
            bar.total, bar.n = of, step
            bar.set_description(f"build {what}: {phase}")

        yield show
    check_interrupt()
