"""Bundles with the weights that every racer uses: the shipped one for tiny, random weights for small and big.

Latency does not ask what the weights are. They are exported by `cascade-export` itself, in a process of its own, whose
time and peak memory are a result too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cascade_rt.bundle import find_bundle
from cascade_rt.errors import BundleError, CascadeError
from cascade_rt.manifest import Runtime
from cascade_rt.stages import Size, StageName

# runs a command's entry point and says on its last line what memory it took
_RUN = """
import json, sys
from cascade_bench.worker import memory
from cascade_export.cli import main
code = main(sys.argv[1:])
print(json.dumps(memory()))
sys.exit(code)
"""


@dataclass(frozen=True, kw_only=True)
class Export:
    """One export that was needed.

    Attributes:
        size: ``tiny``, ``small`` or ``big``.
        stage: the word for it on the command line.
        precision: a name of `stages.PRECISIONS`.
        runtime: of the engine files.
        seconds: of the whole process.
        peak_mib: the process's largest resident size; None where the system does not say.
    """

    size: str
    stage: str
    precision: str
    runtime: str
    seconds: float
    peak_mib: float | None


def bundle_folder(folder: Path, size: Size, precision: str) -> Path:
    """Where the bundle lies that everyone uses: in ``folder``, with random weights, or the shipped one."""
    if size == "tiny" and precision == "fp32":
        return find_bundle(None).path
    return folder / f"{size}-{precision}"


def prepare(
    folder: Path, size: Size, precision: str, stages: list[StageName], runtimes: tuple[Runtime, ...] = ()
) -> tuple[Path, list[Export]]:
    """Export what is not there yet.

    An engine file that cannot be built is a line on standard error; its row will say why, too.

    Args:
        folder: where bundles are kept from run to run.
        size: of the cascade.
        precision: of the engines.
        stages: that are wanted.
        runtimes: that need engine files of their own.

    Returns:
        The bundle, and the exports that were done.

    Raises:
        CascadeError: an export to ONNX failed; with its last line.
    """
    made: list[Export] = []
    bundle = bundle_folder(folder, size, precision)
    for stage in stages:
        if not _has(bundle, stage, "onnx"):
            made.append(export(bundle, size, precision, stage))
        for runtime in runtimes:
            if _has(bundle, stage, runtime):
                continue
            try:
                if size == "tiny" and precision == "fp32":
                    raise CascadeError("no engine files are added to the shipped bundle; race tiny in fp16 or bf16")
                made.append(export(bundle, size, precision, stage, runtime))
            except CascadeError as error:
                print(f"no {runtime} engine files of stage {stage}: {error}", file=sys.stderr)
    return bundle, made


def _has(bundle: Path, stage: StageName, runtime: Runtime) -> bool:
    try:
        engines = find_bundle(bundle).manifest.engines if bundle.is_dir() else ()
    except BundleError:
        return False
    return any(record.spec.stage == stage and record.runtime == runtime for record in engines)


def export(
    bundle: Path,
    size: Size,
    precision: str,
    stage: StageName,
    runtime: Runtime = "onnx",
    environment: Mapping[str, str] | None = None,
) -> Export:
    """Export a stage by `cascade-export`, in a process of its own: tiny's own weights, random ones for other sizes.

    Args:
        bundle: folder to export into.
        size: of the cascade.
        precision: of the engines.
        stage: what to export.
        runtime: of the engine files.
        environment: of the process; None is this one's.

    Raises:
        CascadeError: it failed; with its last line.
    """
    command = ["--stage", stage, "--size", size, "--precision", precision, "--no-verify", "--out", str(bundle)]
    command += [] if size == "tiny" else ["--checkpoint", "random:0"]
    command += [] if runtime == "onnx" else ["--target", runtime]
    print(f"exporting: cascade-export {' '.join(command)}", file=sys.stderr)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cascade-bench-") as empty:  # Python imports from where it is started
        done = subprocess.run(
            [sys.executable, "-c", _RUN, *command],
            cwd=None if environment is None else empty,
            env=None if environment is None else dict(environment),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise CascadeError(f"the export failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return Export(
        size=size,
        stage=stage,
        precision=precision,
        runtime=runtime,
        seconds=time.perf_counter() - started,
        peak_mib=json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"],
    )
