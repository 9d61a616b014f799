"""What engine files are built for: the targets of ``--target`` and ``--sm``, and what they cannot compute."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cascade_rt.backends import PROVIDERS
from cascade_rt.backends.cuda import gpu_sm
from cascade_rt.errors import EngineError, RequestError, shown
from cascade_rt.manifest import Runtime
from cascade_rt.stages import Precision

MODULES: dict[Runtime, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
TARGETS = ("onnx", *MODULES)
DEFAULT_SM = (80, 86, 89, 120)
"""What TensorRT-RTX itself targets when it is told nothing, written down so that a bundle says it."""


@dataclass(frozen=True)
class BuildTarget:
    """An engine runtime, and the GPUs that an engine file for it runs on.

    Attributes:
        runtime: ``onnx``, ``tensorrt`` or ``tensorrt-rtx``.
        sm: compute capabilities, 89 for 8.9; empty for a graph.
    """

    runtime: Runtime
    sm: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.runtime, *(f"sm{number}" for number in self.sm)])

    @property
    def suffix(self) -> str:
        """How the names of its engine files end; a bundle may hold those of both runtimes for one GPU."""
        gpus = "-".join(f"sm{number}" for number in self.sm)
        return f"{'rtx-' if self.runtime == 'tensorrt-rtx' else ''}{gpus}.engine"


ONNX = BuildTarget("onnx")


def resolve_targets(names: Sequence[Runtime], sm: str | None) -> tuple[BuildTarget, ...]:
    """What ``--target`` and ``--sm`` ask for, once it is known that this machine can build it.

    Raises:
        RequestError: an unknown SM, ``--sm`` for another target, or a package that is not installed.
        EngineError: TensorRT is asked for and there is no GPU.
    """
    names = tuple(dict.fromkeys(names))
    if sm is not None and "tensorrt-rtx" not in names:
        raise RequestError(
            f"--sm {shown(sm)} goes with --target tensorrt-rtx; a tensorrt engine file is built for this machine's GPU"
        )
    made: list[BuildTarget] = []
    for name in names:
        if name == "onnx":
            made.append(ONNX)
            continue
        if name == "tensorrt":
            try:
                gpus: tuple[int, ...] = (gpu_sm(),)
            except EngineError as error:
                raise EngineError(
                    f"--target tensorrt builds on the GPU that will run the engine file: {error}; "
                    "--target tensorrt-rtx --sm 86,89,120 builds without one"
                ) from error
        if importlib.util.find_spec(MODULES[name]) is None:
            raise RequestError(f"--target {name} needs its builder; install it with: pip install 'cascade-rt[{name}]'")
        if name == "tensorrt-rtx":
            gpus = _parse_sm(sm)
        made.append(BuildTarget(name, gpus))
    return tuple(made)


def _parse_sm(text: str | None) -> tuple[int, ...]:
    members = importlib.import_module(MODULES["tensorrt-rtx"]).ComputeCapability.__members__
    known = sorted(int(name[2:]) for name in members if name.startswith("SM"))
    if text is None:
        return DEFAULT_SM
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch("[0-9]{2,3}", part) or int(part) not in known:
            raise RequestError(
                f"--sm {shown(part)} is not accepted; TensorRT-RTX builds for {', '.join(map(str, known))}, for "
                "example --sm 86,89,120 (compute capability 8.6, 8.9 and 12.0)"
            )
    return tuple(sorted({int(part) for part in parts}))


LEAST_SM = {"fp8": 89}
"""The first GPUs that have the arithmetic of a precision."""


def check_precision(target: BuildTarget, precision: Precision) -> None:
    """Refuse what a GPU cannot compute before anything is built.

    Raises:
        RequestError: SM 75 with anything but fp16, fp8 before SM 89, or dynamic int8.
    """
    if not PROVIDERS[target.runtime].takes(precision):
        raise RequestError(
            f"--target {target.runtime} cannot be built in {precision.name}, whose products are ONNX Runtime's and "
            "OpenVINO's; use --precision int8-static or fp16, or leave --target out"
        )
    least = LEAST_SM.get(precision.name, 0)
    if older := [sm for sm in target.sm if sm < least]:
        rest = ",".join(str(sm) for sm in target.sm if sm >= least) or str(least)
        raise RequestError(
            f"--sm {older[0]} cannot be built in {precision.name}: GPUs before compute capability {least / 10} have no "
            f"such arithmetic; use --sm {rest}, or --precision int8-static"
        )
    if 75 not in target.sm or target.runtime != "tensorrt-rtx" or precision.name == "fp16":
        return
    reason = {
        "bfloat16": "GPUs of compute capability 7.5 (Turing) have no bfloat16 arithmetic",
        "float32": "TensorRT-RTX has no fp32 matrix product for compute capability 7.5 (Turing)",
    }[precision.compute]
    raise RequestError(
        f"--sm 75 cannot be built in {precision.name}: {reason}; use --precision fp16, or leave 75 out of --sm"
    )
