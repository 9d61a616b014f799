"""What each feature costs beside the plain picture: the shipped cascade, one process, features in turns.

    python benchmarks/features.py --repeat 15 --json benchmarks/results/features_tiny_cpu.json

Every turn makes one picture of each kind, in an order that moves on by one, and the cost of a feature is its time over
the plain picture's of the same turn. Engines are loaded before, so that a feature that needs more of them does not pay
for that here; switching a LoRA on and off is a row of its own. The same is said of processor time, which other work on
the machine disturbs less. The last line on standard output is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from cascade_bench import report
from cascade_rt import CascadeError, CascadePipeline
from cascade_rt.bundle import default_bundle_path
from cascade_rt.tensor_file import TensorFile
from cascade_rt.words import TABLE

PLAIN = "plain picture"
PROMPT = "a red circle on a white background"
SIDE = 256
SETTLE = 0.1
"""Seconds between calls: threads of the last one spin on for a while."""


def write_lora(path: Path, rank: int = 4) -> Path:
    """A LoRA for every query and value of Stage C: what its numbers are makes no difference to the time."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in TensorFile(default_bundle_path() / "stage_c.safetensors").shapes.items():
        if name.endswith(("to_q.weight", "to_v.weight")) and len(shape) == 2:
            key = f"prior.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(0, 0.05, (rank, shape[1])).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.normal(0, 0.05, (shape[0], rank)).astype(np.float32)
    return write_tensors(path, tensors)


def write_word(path: Path) -> Path:
    """A taught word of two vectors."""
    _, width = TensorFile(default_bundle_path() / "text_encoder.safetensors").shapes[TABLE]
    return write_tensors(path, {"<mine>": np.random.default_rng(0).normal(0, 0.02, (2, width)).astype(np.float32)})


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """A safetensors file."""
    from safetensors.numpy import save_file

    save_file(dict(tensors), path)
    return path


def star() -> Image.Image:
    """The picture that features begin from, vary or follow."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    corners = [
        (128 + radius * np.sin(np.pi * k / 5), 128 - radius * np.cos(np.pi * k / 5))
        for k, radius in enumerate([90, 36] * 5)
    ]
    ImageDraw.Draw(picture).polygon(corners, fill="blue")
    return picture


def right_half() -> Image.Image:
    """The mask of the inpainting row."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    return mask


def features(
    open_pipe: Callable[[], CascadePipeline], folder: Path, steps: tuple[int | None, int | None]
) -> dict[str, Callable[[], Any]]:
    """What is timed, by its name.

    Args:
        open_pipe: opens the shipped cascade.
        folder: for the files that features need.
        steps: of Stages C and B; None: the bundle's.
    """
    common: dict[str, Any] = {"seed": 0, "prior_num_inference_steps": steps[0], "num_inference_steps": steps[1]}
    pipe, styled, taught, switched = (open_pipe() for _ in range(4))
    lora = write_lora(folder / "style.safetensors")
    styled.load_lora_weights(lora)
    taught.load_textual_inversion(write_word(folder / "mine.safetensors"))
    picture, mask = star(), right_half()

    def switch() -> None:
        switched.load_lora_weights(lora)
        switched.unload_lora_weights()

    return {
        PLAIN: lambda: pipe(PROMPT, **common),
        "negative prompt, guidance in both stages": lambda: pipe(
            PROMPT, negative_prompt="a star", prior_guidance_scale=2.0, decoder_guidance_scale=1.1, **common
        ),
        "weighted prompt": lambda: pipe(f"{PROMPT} (red:1.3)", prompt_syntax="weighted", **common),
        "taught word": lambda: taught("a <mine> circle on a white background", **common),
        "image prompt": lambda: pipe(PROMPT, picture, **common),
        "image-to-image, strength 0.7": lambda: pipe(PROMPT, init_image=picture, strength=0.7, **common),
        "inpainting": lambda: pipe(PROMPT, init_image=picture, mask_image=mask, **common),
        "ControlNet (canny)": lambda: pipe(PROMPT, control_image=picture, **common),
        "LoRA": lambda: styled(PROMPT, **common),
        "LoRA switched on and off, no picture": switch,
    }


def measure(made: Mapping[str, Callable[[], Any]], repeats: int, quiet: bool) -> list[dict[str, Any]]:
    """A row for every feature.

    Args:
        made: from `features`.
        repeats: timed turns; two before them load engines and are not counted.
        quiet: no progress bar.
    """
    skipped: dict[str, str] = {}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    names = list(made)
    for turn in tqdm(range(-2, repeats), desc="turns", disable=True if quiet else None):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in skipped:
                continue
            time.sleep(SETTLE)
            started, used = time.perf_counter(), time.process_time()
            try:
                made[name]()
            except CascadeError as error:
                skipped[name] = str(error)
                continue
            if turn >= 0:
                taken[name].append((time.perf_counter() - started, time.process_time() - used))
    return [_row(name, taken[name], taken[PLAIN], skipped.get(name)) for name in names]


def _row(
    name: str, taken: list[tuple[float, float]], plain: list[tuple[float, float]], skipped: str | None
) -> dict[str, Any]:
    """Seconds, and seconds and processor time over the plain picture's, each with its percentiles."""
    row: dict[str, Any] = {"what": name, "repeats": len(taken), "skipped": skipped}
    pairs = [] if skipped else list(zip(taken, plain, strict=True))
    figures = {
        "s": [wall for wall, _ in taken],
        "ratio": [one[0] / other[0] for one, other in pairs],
        "processor_ratio": [one[1] / other[1] for one, other in pairs],
    }
    for unit, values in figures.items():
        low, middle, high = np.percentile(values, (10, 50, 90)) if values else (None, None, None)
        for part, value in (("median", middle), ("p10", low), ("p90", high)):
            row[f"{part}_{unit}"] = None if value is None else round(float(value), 6)
    return row


def main(argv: list[str] | None = None) -> int:
    """Entry point: 1 where a feature failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--provider", default="cpu", help="cpu, openvino, ... (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="within an operator (default: 2)")
    parser.add_argument("--repeat", type=int, default=15, help="timed turns (default: 15)")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(None, None), metavar=("C", "B"), help="(default: the bundle's)"
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    facts = {"machine": report.machine(args.threads), "versions": report.versions(), "commit": report.commit()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cascade-features-")))

        def open_pipe() -> CascadePipeline:
            pipe = CascadePipeline.from_pretrained(provider=args.provider, threads=args.threads)
            pipe.set_progress_bar_config(disable=True)
            return stack.enter_context(pipe)

        rows = measure(features(open_pipe, folder, tuple(args.steps)), args.repeat, args.quiet)
    result = {**facts, "provider": args.provider, "bundle": "cascade-tiny", "rows": rows}
    if args.json is not None:
        report.write_json(result, args.json)
    for row in rows:
        told = row["skipped"] or f"{row['median_s'] * 1000:8.1f} ms  {row['median_ratio']:.2f} x"
        print(f"{row['what']:42} {told}", file=sys.stderr)
    print(json.dumps(result))
    return 1 if any(row["skipped"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
