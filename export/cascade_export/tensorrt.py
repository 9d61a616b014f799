"""Graph -> TensorRT plan, for TensorRT (on the GPU that will run it) and TensorRT-RTX (ahead of time, without a GPU).

Networks are strongly typed: a plan computes in the precision that its graph was exported in. `tensorrt_build` makes the
calls, in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cascade_rt
from cascade_rt.backends.cuda import gpu_sm
from cascade_rt.bundle import EngineRecord
from cascade_rt.errors import EngineError, ExportError, RequestError
from cascade_rt.paths import cache_dir
from cascade_rt.shapes import profile
from cascade_rt.stages import EngineSpec, Precision

from .tensorrt_build import Job, Message

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
TARGETS = ("onnx", *MODULES)
DEFAULT_SM = (80, 86, 89, 120)
"""What TensorRT-RTX itself targets when it is told nothing, written down so that a bundle says it."""
STOP_SECONDS = 25.0
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Target:
    """An engine runtime, and the GPUs that a plan for it runs on.

    Attributes:
        runtime: ``onnx``, ``tensorrt`` or ``tensorrt-rtx``.
        sm: compute capabilities, 89 for 8.9; empty for a graph.
    """

    runtime: str
    sm: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.runtime, *(f"sm{number}" for number in self.sm)])

    def file(self, engine: str) -> str:
        """The name of an engine's plan; a bundle may hold those of both runtimes for one GPU."""
        gpus = "-".join(f"sm{number}" for number in self.sm)
        return f"{engine}.{'rtx-' if self.runtime == 'tensorrt-rtx' else ''}{gpus}.engine"


ONNX = Target("onnx")


@dataclass(frozen=True)
class Plan:
    """A plan that was built.

    Attributes:
        record: for the manifest.
        seconds: from loading the builder to the written file.
        peak_mib: largest resident size of the process that built it; None where the system does not say.
    """

    record: EngineRecord
    seconds: float
    peak_mib: int | None


def resolve_targets(names: Sequence[str], sm: str | None) -> tuple[Target, ...]:
    """What ``--target`` and ``--sm`` ask for, once it is known that this machine can build it.

    Raises:
        RequestError: an unknown SM, ``--sm`` for another target, or a package that is not installed.
        EngineError: TensorRT is asked for and there is no GPU.
    """
    names = tuple(dict.fromkeys(names))
    if sm is not None and "tensorrt-rtx" not in names:
        raise RequestError(
            f"--sm {sm} goes with --target tensorrt-rtx; a tensorrt plan is built for the GPU of this machine"
        )
    made = []
    for name in names:
        if name == "onnx":
            made.append(ONNX)
            continue
        if name == "tensorrt":
            try:
                gpus: tuple[int, ...] = (gpu_sm(),)
            except EngineError as error:
                raise EngineError(
                    f"--target tensorrt builds on the GPU that will run the plan: {error}; "
                    "--target tensorrt-rtx --sm 86,89,120 builds without one"
                ) from error
        if importlib.util.find_spec(MODULES[name]) is None:
            raise RequestError(f"--target {name} needs its builder; install it with: pip install 'cascade-rt[{name}]'")
        if name == "tensorrt-rtx":
            gpus = _parse_sm(sm)
        made.append(Target(name, gpus))
    return tuple(made)


def _parse_sm(text: str | None) -> tuple[int, ...]:
    members = importlib.import_module(MODULES["tensorrt-rtx"]).ComputeCapability.__members__
    known = sorted(int(name[2:]) for name in members if name.startswith("SM"))
    if text is None:
        return DEFAULT_SM
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) not in known:
            raise RequestError(
                f"--sm {part!r} is not accepted; TensorRT-RTX builds for {', '.join(map(str, known))}, for example "
                "--sm 86,89,120 (compute capability 8.6, 8.9 and 12.0)"
            )
    return tuple(sorted({int(part) for part in parts}))


def check_precision(target: Target, precision: Precision) -> None:
    """Refuse what a GPU cannot compute before anything is built.

    Raises:
        RequestError: SM 75 with bf16 or fp32.
    """
    if 75 not in target.sm or target.runtime != "tensorrt-rtx" or precision == "fp16":
        return
    reason = {
        "bf16": "GPUs of compute capability 7.5 (Turing) have no bfloat16 arithmetic",
        "fp32": "TensorRT-RTX has no fp32 matrix product for compute capability 7.5 (Turing)",
    }[precision]
    raise RequestError(
        f"--sm 75 cannot be built in {precision}: {reason}; use --precision fp16, or leave 75 out of --sm"
    )


def build_plan(
    target: Target,
    graph: EngineRecord,
    folder: Path,
    hashes: tuple[str, list[str]],
    spec: EngineSpec,
    path: Path,
    progress: Progress = lambda phase, step, of: None,
) -> Plan:
    """Build the plan of an engine.

    Args:
        target: from `resolve_targets`.
        graph: record of the graph.
        folder: where the graph and its weights lie.
        hashes: SHA-256 of the graph and of its weights files.
        spec: the engine with the ranges of the plan, from `shapes.narrow`.
        path: file to write; it appears when the plan is whole.
        progress: called with a phase, its step and its number of steps.

    Raises:
        ExportError: the graph does not parse or the plan cannot be built.
        KeyboardInterrupt: after the build has been stopped, nothing being left of it.
    """
    beside = path.with_name(f".{path.name}.partial")
    cache = None
    if target.runtime == "tensorrt":  # TensorRT-RTX tunes on the user's GPU, at run time, and times nothing here
        version = importlib.import_module(MODULES[target.runtime]).__version__
        cache = str(cache_dir() / "tensorrt" / f"timing-{version}-sm{target.sm[0]}.cache")
    job: Job = {
        "module": MODULES[target.runtime],
        "graph": str(folder / graph.file),
        "plan": str(beside),
        "profile": profile(spec),
        "sm": list(target.sm) if target.runtime == "tensorrt-rtx" else [],
        "exact": graph.precision == "fp32",
        "timing_cache": cache,
    }
    try:
        done = _run(job, progress)
        if "error" in done:
            raise ExportError(f"{spec.name} cannot be built for {target}: {done['error']}")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    record = EngineRecord(
        spec,
        path.name,
        target.runtime,
        graph.precision,
        (),
        None,
        {"cascade-rt": cascade_rt.__version__, target.runtime: done["version"]},
        None,
        {
            "sm": list(target.sm),
            "version": done["version"],
            "profile": job["profile"],
            "flags": done["flags"],
            "graph_sha256": hashes[0],
            "weights_sha256": hashes[1],
        },
    )
    return Plan(record, done["seconds"], done["peak_mib"])


def _run(job: Job, progress: Progress) -> Message:
    """Run a job in a process of its own and wait for its last message."""
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
            child.stdin.write(json.dumps(job) + "\n")
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
