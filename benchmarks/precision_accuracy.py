"""What a precision costs in pictures: cascade-tiny in other precisions beside fp32, on the same captions and seeds.

    cascade-export --stage all --size tiny --precision int8 --out tiny-int8
    python benchmarks/precision_accuracy.py --row tiny-int8:cpu --row tiny-int8:openvino --json int8_tiny.json

The captions are held out from training; pictures are judged as in `tiny_accuracy.py`, and compared with those of the
shipped bundle in fp32 on ONNX Runtime. The last line on standard output is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cascade_bench import report
from cascade_rt import CascadeError, CascadePipeline
from cascade_tiny import scenes
from cascade_tiny.judge import Picture, judge, psnr
from tiny_accuracy import generate, relations, share


def drawn(bundle: Path | None, provider: str, captions: list[str], seed: int) -> tuple[str, list[Picture]]:
    """The precision of a bundle's Stage C, and a picture for every caption."""
    with CascadePipeline.from_pretrained(bundle, provider=provider) as pipe:
        pipe.set_progress_bar_config(disable=True)
        precision = pipe.bundle.manifest.records("stage_c.step")[0].precision.name
        return precision, generate(pipe, captions, seed, {}, bar=True)


def measure(rows: Sequence[str], pictures: int, several_pictures: int, seed: int) -> list[dict[str, Any]]:
    """A row for fp32 and for each ``BUNDLE:PROVIDER``.

    Args:
        rows: what to compare.
        pictures: how many held-out captions of one shape.
        several_pictures: how many captions of two and three shapes.
        seed: of the first picture.

    Raises:
        CascadeError: a bundle cannot be opened.
    """
    wishes = scenes.held_out_wishes()[:pictures]
    several = relations(several_pictures)
    captions = [scenes.canonical(wish) for wish in wishes] + [caption for caption, _ in several]
    found: list[dict[str, Any]] = []
    exact: list[Picture] = []
    for row in (":cpu", *rows):
        place, _, provider = row.rpartition(":")
        precision, made = drawn(Path(place) if place else None, provider, captions, seed)
        exact = exact or made
        apart = [psnr(a, b) for a, b in zip(made, exact, strict=True)] if found else []
        found.append(
            {
                "precision": precision,
                "provider": provider,
                "held_out": share([judge(m, w) for m, w in zip(made[: len(wishes)], wishes, strict=True)]),
                "several": share([judge(m, s) for m, (_, s) in zip(made[len(wishes) :], several, strict=True)]),
                "pictures": [len(wishes), len(several)],
                "psnr_mean": round(float(np.mean(apart)), 2) if apart else None,
                "psnr_p10": round(float(np.quantile(apart, 0.1)), 2) if apart else None,
                "psnr_least": round(float(np.min(apart)), 2) if apart else None,
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", required=True, metavar="BUNDLE:PROVIDER", help="repeatable")
    parser.add_argument("--pictures", type=int, default=400, help="held-out captions (default: 400)")
    parser.add_argument("--several", type=int, default=109, help="captions of two and three shapes (default: 109)")
    parser.add_argument("--seed", type=int, default=1000, help="the first picture's seed (default: 1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    arguments = parser.parse_args(argv)
    try:
        rows = measure(arguments.row, arguments.pictures, arguments.several, arguments.seed)
    except CascadeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {"machine": report.machine(1), "versions": report.versions(), "commit": report.commit(), "rows": rows}
    if arguments.json:
        report.write_json(result, arguments.json)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
