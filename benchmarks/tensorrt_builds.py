"""Build time and size of TensorRT-RTX engine files, for every engine of a bundle and several GPUs.

    python benchmarks/tensorrt_builds.py --bundle fp16 --bundle bf16 --json out.json

Each engine file is built by a process of its own, as ``cascade-export`` does it; the time is that process's, from
loading the builder to the written file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cascade_bench import report
from cascade_export.engine_files import Graph, build_engine_file, fitted
from cascade_export.shape_options import parse_shapes
from cascade_export.targets import BuildTarget, check_precision, resolve_targets
from cascade_rt.bundle import Bundle
from cascade_rt.errors import CascadeError, RequestError
from cascade_rt.sizes import grids_of


def graphs_of(bundle: Bundle) -> list[Graph]:
    """The graphs of a bundle, as the exporter's builder takes them."""
    files = bundle.manifest.files
    return [
        Graph(
            record=record,
            folder=bundle.path,
            hashes=(files[record.file].sha256, tuple(files[name].sha256 for name in record.weights)),
        )
        for record in bundle.manifest.engines
        if record.runtime == "onnx"
    ]


def rows(bundle: Bundle, targets: Sequence[BuildTarget], shapes: str) -> Iterator[dict[str, Any]]:
    """A row for every engine and target.

    Raises:
        CascadeError: an engine file cannot be built.
    """
    manifest = bundle.manifest
    pairs = fitted(graphs_of(bundle), parse_shapes(shapes), manifest.model, grids_of(manifest))
    with tempfile.TemporaryDirectory() as folder:
        for graph, spec in pairs:
            record = graph.record
            for target in targets:
                check_precision(target, record.precision)
                path = Path(folder) / f"{record.name}.{target.suffix}"
                built = build_engine_file(target, graph, spec, path)
                yield {
                    "model": manifest.model.size,
                    "engine": record.name,
                    "precision": record.precision.name,
                    "sm": list(target.sm),
                    "seconds": round(built.seconds, 2),
                    "bytes": built.file.bytes,
                    "builder_peak_mib": built.peak_mib,
                    "weights_bytes": sum(manifest.files[name].bytes for name in record.weights),
                }
                path.unlink()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append", required=True, help="bundle with graphs; repeatable")
    parser.add_argument("--sm", default="86,89,120", help="GPUs; each alone and all in one file (default: 86,89,120)")
    parser.add_argument("--shapes", default="default", help="as in cascade-export")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of a run, for JSON.

    Raises:
        CascadeError: the request is wrong, or an engine file cannot be built.
    """
    (together,) = resolve_targets(["tensorrt-rtx"], arguments.sm)
    targets = list(dict.fromkeys([*(BuildTarget(together.runtime, (number,)) for number in together.sm), together]))
    found = []
    for path in arguments.bundle:
        for row in rows(Bundle(path), targets, arguments.shapes):
            print(json.dumps(row), file=sys.stderr)
            found.append(row)
    return {
        "machine": report.machine(1),
        "versions": report.versions(),
        "commit": report.commit(),
        "shapes": arguments.shapes,
        "rows": found,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = parse(argv)
    try:
        result = measure(arguments)
        if arguments.json:
            report.write_json(result, arguments.json)
        else:
            print(json.dumps(result, indent=1))
    except CascadeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
