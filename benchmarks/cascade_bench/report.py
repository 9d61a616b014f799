"""The result of a run: JSON, a table in Markdown, a plot."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from cascade_bench.jobs import OURS
from cascade_bench.race import Row
from cascade_rt.files import written_whole

_PACKAGES = (
    "cascade-rt",
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx",
    "numpy",
)
_HEADINGS = (
    *("what", "peer", "precision", "batch, px", "median (p10 - p90)", "x eager"),
    *("of roofline", "error", "peak (own) MiB", "load", "first"),
)
# one colour a peer, whatever else is in a plot
COLOURS = {OURS: "#0b6e4f", "eager": "#c1440e", "compile": "#6a4c93", "compile-max-autotune": "#3a86c8"}


def machine(threads: int) -> dict[str, Any]:
    """What the run ran on."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": _gpu_name(),
    }
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
        extensions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
        return f"{name} ({', '.join(extensions)})"
    return platform.processor()


def _gpu_name() -> str | None:
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip() or None


def versions() -> dict[str, str]:
    """Python's and the packages' that take part."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path | None = None) -> str | None:
    """A checkout's commit, with a + if files differ from it; None outside of one.

    Args:
        folder: of the checkout; None is where this file lies.
    """
    here = folder or Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def document(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything of a run, for `json.dump`."""
    return {**facts, "rows": [asdict(row) for row in rows]}


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write a result whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def seconds_text(value: float | None) -> str:
    """A time for people."""
    if value is None:
        return ""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of a result (`document`'s) as a Markdown table; what was skipped keeps its line and says why."""
    lines = [
        f"| {' | '.join(_HEADINGS)} |",
        f"| {' | '.join('---' for _ in _HEADINGS)} |",
    ]
    for row in rows:
        size = f" {row['size']}" if row["size"] else ""
        peer = row["peer"] if row["peer"] != OURS or row["provider"] == "cpu" else f"{OURS} {row['provider']}"
        shape = f"{row['batch']}, {row['pixels']}" if row["batch"] else ""
        head = f"| {row['what']}{size} | {peer} | {row['precision']} | {shape} |"
        if row["median_s"] is None:
            lines.append(f"{head} skipped: {row['skipped']} |  |  |  |  |  |  |")
            continue
        share = "" if row["roofline_share"] is None else f"{100 * row['roofline_share']:.0f} %"
        error = "" if row["rel_error"] is None else f"{row['rel_error']:.1e}"
        ratio = "" if row["ratio_to_eager"] is None else f"{row['ratio_to_eager']:.2f}"
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        own = row.get("own_mib")  # results from before it was measured have the peak alone
        peak += "" if own is None else f" ({own:.0f})"
        spread = f"{seconds_text(row['median_s'])} ({seconds_text(row['p10_s'])} - {seconds_text(row['p90_s'])})"
        note = f" {row['skipped']}" if row["skipped"] else ""
        load, first = seconds_text(row["load_s"]), seconds_text(row["first_s"])
        lines.append(f"{head} {spread}{note} | {ratio} | {share} | {error} | {peak} | {load} | {first} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Medians with p10 and p90 on a log axis; one group a task.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    timed = [row for row in rows if row["median_s"] is not None]
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.3 * max(1, len(timed))))
    labels = []
    for place, row in enumerate(timed):
        low, high = row["median_s"] - row["p10_s"], row["p90_s"] - row["median_s"]
        axes.barh(
            place,
            row["median_s"],
            xerr=[[low], [high]],
            color=COLOURS[row["peer"]],
            alpha=1.0 if row["precision"] == "fp32" else 0.6,
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        where = f"{row['batch']} x {row['pixels']} px" if row["batch"] else ""
        provider = "" if row["provider"] == "cpu" else f" {row['provider']}"
        labels.append(f"{row['what']} {row['size']} {where} {row['precision']}{provider}")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds, median with p10 and p90; pale: bf16 and fp16")
    seen = [peer for peer in COLOURS if any(row["peer"] == peer for row in timed)]
    axes.legend(handles=[Patch(color=COLOURS[peer], label=peer) for peer in seen], fontsize=8)
    axes.grid(axis="x", which="both", alpha=0.25)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
