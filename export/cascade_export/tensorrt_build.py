"""One engine file, built in a process of its own: ``python -m cascade_export.tensorrt_build``.

A failed build leaves TensorRT-RTX with the failed target for the rest of the process, and a build cannot be stopped
from outside of it; so every engine file has its process. It reads a `BuildOrder` as one line of JSON from standard
input, writes `Message` lines to standard output, and cancels the build when standard input ends, that is also when the
process that asked for it has died.

The calls are those that TensorRT 10.13 to 11.4 and TensorRT-RTX 1.7 share. Enumerators are taken by name: their
numbers differ between versions.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

CANCEL_SECONDS = 20.0
PROGRESS_SECONDS = 0.1
LONGEST_REASON = 400


class BuildOrder(TypedDict):
    """What to build.

    Attributes:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        graph: ONNX file; its weights lie beside it.
        engine_file: file to write.
        profile: input -> smallest, tuned and largest shape.
        sm: compute capabilities to build for; empty: the GPU at hand.
        exact: keep fp32 products from being computed in TF32.
        timing_cache: file to read and write, None for none.
    """

    module: str
    graph: str
    engine_file: str
    profile: Mapping[str, Sequence[Sequence[int]]]
    sm: list[int]
    exact: bool
    timing_cache: str | None


class Message(TypedDict, total=False):
    """What has happened: ``phase``, ``step`` and ``of`` go together; ``error`` or ``flags`` ... ``peak_mib`` end it."""

    phase: str
    step: int
    of: int
    error: str
    cancelled: bool
    version: str
    flags: list[str]
    seconds: float
    peak_mib: int | None


class BuildError(Exception):
    """The engine file could not be built; the text says why."""


class Cancelled(Exception):  # noqa: N818 - not an error: it was asked for
    """The build was cancelled."""


def build(order: BuildOrder, send: Callable[[Message], None], cancelled: threading.Event) -> Message:
    """Build an engine file.

    Raises:
        BuildError: the graph does not parse, or the engine file cannot be built.
        Cancelled: ``cancelled`` was set.
    """
    started = time.perf_counter()
    trt = importlib.import_module(order["module"])
    log = _logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError:  # how the bindings say that creation failed
        raise BuildError(f"{order['module']} {trt.__version__} cannot start here: {_said(log)}") from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(order["graph"]):
        raise BuildError(f"{Path(order['graph']).name} cannot be parsed: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    flags = _configure(trt, config, order)
    shapes = builder.create_optimization_profile()
    for name, (low, opt, high) in order["profile"].items():
        shapes.set_shape(name, tuple(low), tuple(opt), tuple(high))
    if config.add_optimization_profile(shapes) < 0:
        raise BuildError(f"the profile is refused: {_said(log)}")
    if order["timing_cache"] is not None:
        _load_timing_cache(config, Path(order["timing_cache"]))
    config.progress_monitor = _monitor(trt, send, cancelled)
    built = builder.build_serialized_network(network, config)
    if cancelled.is_set():
        raise Cancelled
    if built is None:
        raise BuildError(_said(log))
    with Path(order["engine_file"]).open("wb") as file:
        file.write(memoryview(built))
    if order["timing_cache"] is not None:
        _save_timing_cache(config, Path(order["timing_cache"]))
    return {
        "version": str(trt.__version__),
        "flags": flags,
        "seconds": time.perf_counter() - started,
        "peak_mib": _peak_mib(),
    }


def _configure(trt: Any, config: Any, order: BuildOrder) -> list[str]:
    """Set flags and target GPUs; the names of the flags that are set."""
    if order["exact"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    # without it TensorRT-RTX may allocate while it runs, which a CUDA graph cannot record; TensorRT has no such flag
    if "REQUIRE_USER_ALLOCATION" in trt.BuilderFlag.__members__:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if order["sm"]:
        config.num_compute_capabilities = len(order["sm"])
        for index, sm in enumerate(order["sm"]):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index):
                raise BuildError(f"SM {sm} is refused as a target")
    return sorted(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag))


def _load_timing_cache(config: Any, path: Path) -> None:
    """Hand over what earlier builds measured; what another version measured is of no use, and not an error."""
    known = path.read_bytes() if path.is_file() else b""
    for content in (known, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return
    raise BuildError("an empty timing cache is refused")


def _save_timing_cache(config: Any, path: Path) -> None:
    content = bytes(config.get_timing_cache().serialize())
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


def _peak_mib() -> int | None:
    """Largest resident size of this process, where the system says it.

    Not ``ru_maxrss``: that starts at the size of the process which started this one.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), None)


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(f"node {e.node_name() or '?'} ({e.node_operator() or '?'}): {e.desc()}" for e in errors[:3])


def _logger(trt: Any) -> Any:
    """A logger that keeps errors, for the one that is raised."""

    class Kept(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Kept()


def _said(log: Any) -> str:
    reasons = dict.fromkeys(error[:LONGEST_REASON] for error in log.errors[-3:])  # some hold whole weights
    return "; ".join(reasons) or "TensorRT gave no reason"


def _monitor(trt: Any, send: Callable[[Message], None], cancelled: threading.Event) -> Any:
    """Reports phases as they pass, and tells the builder to stop."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._sent = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:  # noqa: ARG002
            self._steps[phase] = steps
            self._report(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._report(phase, step + 1)
            return not cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

        def _report(self, phase: str, step: int) -> None:
            now = time.perf_counter()
            if now - self._sent >= PROGRESS_SECONDS:
                self._sent = now
                send({"phase": phase, "step": step, "of": self._steps.get(phase, step)})

    return Monitor()


def main() -> int:
    """Build what standard input asks for; returns the exit code."""
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # libraries that print must not garble the messages
    order: BuildOrder = json.loads(sys.stdin.readline())
    cancelled = threading.Event()

    def send(message: Message) -> None:
        try:
            wire.write(json.dumps(message) + "\n")
        except BrokenPipeError:  # an exception must not pass through the builder, which calls this
            cancelled.set()

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would be held when the interpreter ends
            continue
        cancelled.set()
        time.sleep(CANCEL_SECONDS)
        os._exit(1)  # the builder is in a phase without steps, and the process that asked for it has ended

    threading.Thread(target=watch, daemon=True).start()
    try:
        send(build(order, send, cancelled))
    except Cancelled:
        send({"cancelled": True})
    except (BuildError, OSError, MemoryError) as error:
        send({"error": str(error) or type(error).__name__})
    return 0


if __name__ == "__main__":
    sys.exit(main())
