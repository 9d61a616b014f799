"""Build time and size of TensorRT-RTX plans, for every engine of a bundle and several GPUs: ``--help`` has an example.

Each plan is built by a process of its own, as ``cascade-export`` does it; the time is that process's, from loading the
builder to the written file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cascade_export.shapes import parse_shapes
from cascade_export.tensorrt import Target, build_plan, check_precision, resolve_targets
from cascade_rt.bundle import Bundle
from cascade_rt.shapes import narrow


def rows(bundle: Bundle, targets: list[Target], shapes: str) -> Iterator[dict[str, Any]]:
    graphs = [record for record in bundle.manifest.records if record.runtime == "onnx"]
    specs = narrow([graph.spec for graph in graphs], parse_shapes(shapes), bundle.manifest.model)
    files = bundle.manifest.files
    with tempfile.TemporaryDirectory() as folder:
        for graph in graphs:
            for target in targets:
                check_precision(target, graph.precision)
                path = Path(folder) / target.file(graph.spec.name)
                weights = [files[name]["sha256"] for name in graph.weights]
                hashes = files[graph.file]["sha256"], weights
                plan = build_plan(target, graph, bundle.path, hashes, specs[graph.spec.name], path)
                yield {
                    "model": bundle.manifest.model.size,
                    "engine": graph.spec.name,
                    "precision": graph.precision,
                    "sm": list(target.sm),
                    "seconds": round(plan.seconds, 2),
                    "bytes": path.stat().st_size,
                    "builder_peak_mib": plan.peak_mib,
                    "weights_bytes": sum(files[name]["bytes"] for name in graph.weights),
                }
                path.unlink()


def machine() -> dict[str, Any]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "gpu": None,
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build every graph of bundles with TensorRT-RTX and report time and size.",
        epilog="example: python benchmarks/tensorrt_builds.py --bundle fp16 --bundle bf16 --json out.json",
    )
    parser.add_argument("--bundle", type=Path, action="append", required=True, help="bundle with graphs; repeatable")
    parser.add_argument("--sm", default="86,89,120", help="GPUs; each alone and all in one plan (default: 86,89,120)")
    parser.add_argument("--shapes", default="default", help="as in cascade-export")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    arguments = parser.parse_args()
    together = resolve_targets(["tensorrt-rtx"], arguments.sm)[0]
    targets = [*(Target(together.runtime, (number,)) for number in together.sm), together]
    found = []
    for path in arguments.bundle:
        for row in rows(Bundle(path), targets, arguments.shapes):
            print(json.dumps(row), file=sys.stderr)
            found.append(row)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    import tensorrt_rtx

    result = {
        "machine": machine(),
        "versions": {"tensorrt-rtx": tensorrt_rtx.__version__, "python": platform.python_version()},
        "commit": commit.stdout.strip() or None,
        "shapes": arguments.shapes,
        "rows": found,
    }
    text = json.dumps(result, indent=1) + "\n"
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
