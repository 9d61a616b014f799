"""Bundles with the weights that every racer uses: the shipped one for tiny, random weights for small and big.

Latency does not ask what the weights are. They are exported by `cascade-export` itself, in a process of its own, whose
time and peak memory are a result too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cascade_rt.bundle import find_bundle
from cascade_rt.errors import BundleError, CascadeError
from cascade_rt.stages import Precision, Size, StageName

# runs a command's entry point and says on its last line what memory it took
_RUN = """
import json, sys
from cascade_bench.worker import memory
from cascade_export.cli import main
code = main(sys.argv[1:])
print(json.dumps(memory()))
sys.exit(code)
"""


@dataclass(frozen=True)
class Export:
    """One export that was needed: what, how long (s), and its peak memory (MiB)."""

    size: str
    stage: str
    precision: str
    seconds: float
    peak_mib: float | None


def bundle_folder(folder: Path, size: Size, precision: Precision) -> Path:
    """Where a bundle of random weights lies, or the shipped one."""
    if size == "tiny" and precision == "fp32":
        return find_bundle(None).path
    return folder / f"{size}-{precision}"


def prepare(
    folder: Path, size: Size, precision: Precision, stages: list[StageName], plans: tuple[str, ...] = ()
) -> tuple[Path, list[Export]]:
    """Exports what is not there yet. A plan that cannot be built is a line on standard error: its row will say so too.

    Args:
        folder: where bundles are kept from run to run.
        size: of the cascade.
        precision: of the engines.
        stages: that are wanted.
        plans: runtimes that need plans of their own.

    Returns:
        The bundle, and the exports that were done.

    Raises:
        CascadeError: an export to ONNX failed; with its last line.
    """
    made: list[Export] = []
    bundle = bundle_folder(folder, size, precision)
    for stage in stages:
        source = [] if size == "tiny" else ["--checkpoint", "random:0"]
        if not _has(bundle, stage, "onnx"):
            made.append(_export(bundle, size, precision, stage, source))
        for plan in plans:
            if _has(bundle, stage, plan):
                continue
            try:
                if size == "tiny" and precision == "fp32":
                    raise CascadeError("plans are not added to the shipped bundle; race tiny's in fp16 or bf16")
                made.append(_export(bundle, size, precision, stage, [*source, "--target", plan]))
            except CascadeError as error:
                print(f"no {plan} plan of stage {stage}: {error}", file=sys.stderr)
    return bundle, made


def _has(bundle: Path, stage: StageName, target: str) -> bool:
    try:
        engines = find_bundle(bundle).manifest.records if bundle.is_dir() else ()
    except BundleError:
        return False
    return any(record.spec.stage == stage and record.runtime == target for record in engines)


def _export(bundle: Path, size: Size, precision: Precision, stage: StageName, more: list[str]) -> Export:
    command = ["--stage", stage, "--size", size, "--precision", precision, "--no-verify", "--out", str(bundle), *more]
    print(f"exporting: cascade-export {' '.join(command)}", file=sys.stderr)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _RUN, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CascadeError(f"the export failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    peak = json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"]
    return Export(size, stage, precision, time.perf_counter() - started, peak)
