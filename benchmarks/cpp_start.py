"""From the start of a process to a PNG on disk, and resident memory: ``cascade-run-cpp`` against ``cascade-run``.

    python benchmarks/cpp_start.py --build build/cpp --repeat 15 --json benchmarks/results/cpp_start.json

Both commands make the same picture of the same bundle with ONNX Runtime on the CPU; they are started in turns. The
memory is the largest resident size that the system notes of a process when it ends, pages of mapped files among it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cascade_bench import report
from cascade_bench.jobs import PROMPT
from cascade_rt.bundle import default_bundle_path

PYTHON = [sys.executable, "-c", "from cascade_rt.entry import main_run; raise SystemExit(main_run())"]
SIZES = {"256 x 256": ["--size", "256x256"], "512 x 512": ["--size", "512x512"]}


def started(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> tuple[float, float]:
    """Seconds, and the largest resident size in MiB, of a process that must not fail.

    Raises:
        SystemExit: it failed, with what it said.
    """
    with (folder / "errors").open("w+") as errors:
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=dict(environment), cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{command[0]} failed: {errors.read().strip()}")
    return seconds, used.ru_maxrss / 1024


def measure(
    commands: Mapping[str, Sequence[str]], repeats: int, environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for every size and command; one start of each before them fills the system's cache."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="cascade-bench-") as name:
        folder = Path(name)
        for size, flags in SIZES.items():
            found: dict[str, list[tuple[float, float]]] = {key: [] for key in commands}
            for turn in range(repeats + 1):
                for key, command in list(commands.items())[:: 1 if turn % 2 else -1]:
                    words = [PROMPT, "--seed", "0", "--provider", "cpu", "--bundle", str(default_bundle_path()), *flags]
                    taken = started([*command, *words, "-o", str(folder / f"{key}.png")], environment, folder)
                    if turn:
                        found[key].append(taken)
            for key, several in found.items():
                p10, median, p90 = (float(x) for x in np.percentile([seconds for seconds, _ in several], (10, 50, 90)))
                memory = float(np.median([mib for _, mib in several]))
                row = {"command": key, "size": size, "repeats": repeats, "p10_s": p10, "median_s": median, "p90_s": p90}
                rows.append({**row, "resident_mib": memory})
    return rows


def stripped_kib(file: Path) -> float:
    """Size of a program or library without its symbols."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        shutil.copyfile(file, copy)
        subprocess.run(["strip", str(copy)], check=True)
        return copy.stat().st_size / 1024


def onnxruntime_library() -> Path:
    """The shared library inside the installed Python package."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise SystemExit("onnxruntime is not installed; pip install onnxruntime")
    return next(iter(sorted((Path(found.origin).parent / "capi").glob("libonnxruntime.*"))))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people; times and memory of ``cascade-run-cpp`` as shares of ``cascade-run``'s."""
    lines = [
        "| picture | command | start to PNG (p10 - p90) | of Python's | resident | of Python's |",
        f"|{' --- |' * 6}",
    ]
    for row in rows:
        base = next(r for r in rows if r["size"] == row["size"] and r["command"] == "cascade-run")
        times = f"{row['median_s'] * 1e3:.0f} ms ({row['p10_s'] * 1e3:.0f} - {row['p90_s'] * 1e3:.0f})"
        shares = [f"{row[key] / base[key]:.2f}" for key in ("median_s", "resident_mib")]
        cells = (row["size"], row["command"], times, shares[0], f"{row['resident_mib']:.0f} MiB", shares[1])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(result: Mapping[str, Any]) -> str:
    """A result: where it was measured, its table, and the sizes of what was built."""
    machine = result["machine"]
    sizes = ", ".join(f"`{name}` {kib:.0f} KiB" for name, kib in result["stripped_kib"].items())
    return (
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"{result['rows'][0]['repeats']} starts of each; load average before: {machine['load_before']}. "
        f"Stripped: {sizes}.\n\n{table(result['rows'])}\n"
    )


def main() -> int:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, help="folder that cmake has built the kit in")
    parser.add_argument("--shared", type=Path, help="libcascade_rt.so of a build with BUILD_SHARED_LIBS, for its size")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    program = args.build.resolve() / "cascade-run-cpp"
    environment = {**os.environ, "ONNXRUNTIME_LIBRARY": str(onnxruntime_library())}
    facts = {"machine": report.machine(os.cpu_count() or 1), "versions": report.versions(), "commit": report.commit()}
    rows = measure({"cascade-run": PYTHON, "cascade-run-cpp": [str(program)]}, args.repeat, environment)
    sizes = {"cascade-run-cpp": stripped_kib(program)}
    if args.shared is not None:
        sizes["libcascade_rt.so"] = stripped_kib(args.shared)
    result = {**facts, "rows": rows, "stripped_kib": sizes}
    print(page(result), end="")
    if args.json is not None:
        report.write_json(result, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
