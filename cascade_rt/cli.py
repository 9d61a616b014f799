"""``cascade-run`` and ``cascade-info``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .backends import PROVIDERS
from .bundle import MANIFEST, find_bundle
from .commands import CommandParser
from .errors import OutputError, RequestError
from .image import save_png
from .pipeline import CascadePipeline
from .sampling import SAMPLERS

RUN_EXAMPLES = """examples:
  cascade-run "a red circle" -o circle.png --seed 0
  cascade-run "an astronaut riding a horse" --bundle cascade-big --size 1536x1024 --provider cuda
  cascade-run "a blue star" --images 4 -o star.png --json
"""
INFO_EXAMPLES = """examples:
  cascade-info
  cascade-info cascade-big --json
"""


def run_parser() -> argparse.ArgumentParser:
    """The command line of ``cascade-run``."""
    parser = CommandParser("cascade-run", "Make a picture from a prompt, without torch.", RUN_EXAMPLES)
    add = parser.add_argument
    add("prompt", help="what to draw")
    add("--bundle", metavar="DIR", help="engine bundle or hub id of one (default: the one that is shipped)")
    add("-o", "--output", type=Path, default=Path("out.png"), metavar="FILE", help="PNG to write (default: out.png)")
    add("--seed", type=int, metavar="N", help="0..2**64-1 (default: a new one)")
    add("--size", metavar="WxH", help="pixels, 64..4096 each (default: the bundle's)")
    add("--steps", type=int, metavar="N", help="Stage C steps")
    add("--guidance", type=float, metavar="X", help="Stage C guidance scale; up to 1 is none")
    add("--decoder-steps", type=int, metavar="N", help="Stage B steps")
    add("--decoder-guidance", type=float, metavar="X", help="Stage B guidance scale; up to 1 is none")
    add("--negative", metavar="TEXT", help="what to draw away from")
    add("--images", type=int, default=1, metavar="N", help="how many pictures; -1, -2, ... is added to the name")
    add("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: the bundle's)")
    add("--provider", default="auto", metavar="NAME", help=f"auto, {', '.join(PROVIDERS)} (default: auto)")
    add("--threads", type=int, metavar="N", help="threads within an operator (default: the runtime's choice)")
    add("--low-memory", action="store_true", help="keep one engine loaded at a time")
    add("--json", action="store_true", help="print what ran, with the time of each stage, as JSON")
    add("--quiet", action="store_true", help="no progress bar")
    add("--version", action="version", version=f"cascade-rt {__version__}")
    return parser


def info_parser() -> argparse.ArgumentParser:
    """The command line of ``cascade-info``."""
    parser = CommandParser("cascade-info", "Show what is in an engine bundle.", INFO_EXAMPLES)
    parser.add_argument("bundle", nargs="?", metavar="DIR", help="bundle (default: the one that is shipped)")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    parser.add_argument("--check", action="store_true", help="read every file and compare its hash")
    parser.add_argument("--version", action="version", version=f"cascade-rt {__version__}")
    return parser


def generate(args: argparse.Namespace) -> None:
    """Do what ``cascade-run`` was asked."""
    warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
    width, height = parse_size(args.size)
    output: Path = args.output
    if output.suffix.lower() != ".png":
        raise RequestError(f"{output} is no PNG name; pictures are written as .png")
    if output.is_dir():
        raise RequestError(f"{output} is a folder; name a file in it")
    if not output.parent.is_dir():
        raise OutputError(f"the folder {output.parent} does not exist; make it with: mkdir -p {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise OutputError(f"the folder {output.parent} cannot be written to")
    seed = int(time.time_ns() % 2**32) if args.seed is None else args.seed
    started = time.perf_counter()
    with CascadePipeline.from_pretrained(args.bundle, args.provider, args.low_memory, args.threads) as pipe:
        if args.quiet:
            pipe.set_progress_bar_config(disable=True)
        out = pipe(
            args.prompt,
            args.negative,
            height=height,
            width=width,
            prior_num_inference_steps=args.steps,
            prior_guidance_scale=args.guidance,
            num_inference_steps=args.decoder_steps,
            decoder_guidance_scale=args.decoder_guidance,
            num_images_per_prompt=args.images,
            seed=seed,
            sampler=args.sampler,
        )
        facts = _facts(args, pipe, seed)
    files = []
    for index, image in enumerate(out.images):
        path = output if len(out.images) == 1 else output.with_stem(f"{output.stem}-{index + 1}")
        save_png(image, path, {k: str(v) for k, v in facts.items()})
        files.append(str(path))
    seconds = {name: round(value, 4) for name, value in out.timings.items()}
    seconds["total"] = round(time.perf_counter() - started, 4)
    if args.json:
        size = out.images[0].size
        print(json.dumps({**facts, "width": size[0], "height": size[1], "files": files, "seconds": seconds}))
        return
    for file in files:
        print(file)
    print("  ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))


def _facts(args: argparse.Namespace, pipe: CascadePipeline, seed: int) -> dict[str, Any]:
    """What made the picture: goes into the PNG and the JSON."""
    sampler = pipe.bundle.manifest.model.default_sampler if args.sampler is None else args.sampler
    preset = pipe.bundle.manifest.sampling[sampler]

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return {
        "prompt": args.prompt,
        "negative_prompt": given(args.negative, ""),
        "seed": seed,
        "sampler": sampler,
        "steps": given(args.steps, preset.prior.num_inference_steps),
        "guidance": given(args.guidance, preset.prior.guidance_scale),
        "decoder_steps": given(args.decoder_steps, preset.decoder.num_inference_steps),
        "decoder_guidance": given(args.decoder_guidance, preset.decoder.guidance_scale),
        "bundle": pipe.bundle.name,
        "provider": pipe.provider,
        "software": f"cascade-rt {__version__}",
    }


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """``WxH`` -> (width, height).

    Raises:
        RequestError: it is not of that form.
    """
    if text is None:
        return None, None
    if not (match := re.fullmatch(r"(-?\d+)x(-?\d+)", text)):
        raise RequestError(f"--size {text!r} is not accepted; write it as WIDTHxHEIGHT, for example 1024x1024")
    return int(match[1]), int(match[2])


def show(args: argparse.Namespace) -> None:
    """Do what ``cascade-info`` was asked."""
    bundle = find_bundle(args.bundle)
    manifest = bundle.manifest
    if args.check:
        for name in manifest.files:
            bundle.file(name)
    if args.json:
        print((bundle.path / MANIFEST).read_text(encoding="utf-8"), end="")
        return
    m = manifest.model
    print(f"{m.name} ({m.size}), from {m.source}; weights: {m.licence}")
    print(f"{m.width} x {m.height} px; samplers: {', '.join(manifest.sampling)}, default {m.default_sampler}")
    total = sum(f["bytes"] for f in manifest.files.values())
    print(f"{len(manifest.files)} files, {total / 2**20:.1f} MiB" + (", all hashes right" if args.check else ""))
    rows = [("engine", "runtime", "precision", "rel. L2", "max", "cosine", "PSNR", "inputs")]
    for record in manifest.records:
        inputs = ", ".join(f"{t.name}[{' x '.join(map(str, t.axes))}]" for t in record.spec.inputs)
        runtime = " ".join([record.runtime, *(f"sm{number}" for number in record.sm)])
        rows.append((record.spec.name, runtime, record.precision, *_figures(record.verification), inputs))
        if (loop := (record.verification or {}).get("loop")) is not None:
            how = f"{loop['sampler']} sampler, {loop['steps']} steps, guidance {loop['guidance_scale']:g}"
            rows.append(("  its whole loop", "", "", *_figures(loop), how))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] + [0]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    print("figures: against fp32 PyTorch")
    for name, model in manifest.models.items():
        if model.loras:
            print(f"{name}: with {', '.join(model.loras)}")
        if (scan := model.stream_scales) is not None:
            print(
                f"{name}: residual stream kept divided by {scan['down']} on the way down and {scan['up']} on the way "
                f"up; largest values seen {scan['largest_down']} and {scan['largest_up']} (fp16 ends at 65504)"
            )


def _figures(verification: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    """Relative L2, largest difference, cosine and PSNR, as `cascade-info` prints them."""
    if verification is None:
        return "not verified", "", "", ""
    v = verification
    psnr = "" if v.get("psnr") is None else f"{v['psnr']:.1f} dB"
    return f"{v['rel_l2']:.1e}", f"{v['max_abs']:.1e}", f"{v['cosine']:.8f}", psnr
