"""``cascade-run`` and ``cascade-info``."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from . import __version__
from .backends import PROVIDERS
from .bundle import find_bundle
from .checks import check_integer, check_pictures, given_or
from .commands import CommandParser, as_integer, as_number, as_path, as_place, say_aside
from .errors import OutputError, RequestError, plain, shown
from .files import check_name, name_of, said_by, write_together, written_whole
from .image import FORMATS, encode_picture, read_request
from .lora import parse_lora
from .manifest import PRESETS, Figures
from .noise import MAX_SEED
from .outputs import CascadeOutput
from .pictures import encoder_pixels, open_picture
from .pipeline import CascadePipeline
from .request import ImagePrompt, LoopSettings, LoraFile, Request, WordFile
from .runner import StepEnd
from .sampling import SAMPLERS
from .seeds import new_seeds
from .stages import CONTROLS
from .words import word_path

RUN_EXAMPLES = """examples:
  cascade-run "a red circle" -o circle.png --seed 0
  cascade-run "an astronaut riding a horse" --bundle cascade-big --size 1536x1024 --provider cuda
  cascade-run "a blue star" --images 4 -o star.png --json
  cascade-run --from star-2.png --steps 30 -o finer.png
  cascade-run --image photo.jpg:0.8 "in winter" -o winter.png
  cascade-run "a green star" --init circle.png --strength 0.7 -o star.png
  cascade-run "a red star" --control star.png -o red-star.png
  cascade-run "a photo of <cat>" --word cat.safetensors:<cat> -o cat.png
  cascade-run --reconstruct circle.png -o again.png
"""
INFO_EXAMPLES = """examples:
  cascade-info
  cascade-info cascade-big --json
"""


def run_parser() -> argparse.ArgumentParser:
    """The command line of ``cascade-run``."""
    parser = CommandParser("cascade-run", "Make a picture from a prompt, without torch.", RUN_EXAMPLES)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw")
    add(
        "--bundle",
        type=as_place,
        metavar="DIR",
        help="engine bundle or hub id of one (default: the one that is shipped)",
    )
    endings = ", ".join(FORMATS)
    add("-o", "--output", type=as_path, default=Path("out.png"), metavar="FILE", help=f"{endings} (default: out.png)")
    add("--from", dest="source", type=as_path, metavar="PICTURE", help="make it again; other flags change the request")
    add(
        "--image",
        action="append",
        default=[],
        type=as_place,
        metavar="FILE[:WEIGHT]",
        help="picture to vary; repeatable",
    )
    add("--init", type=as_place, metavar="FILE", help="picture to begin from")
    add(
        "--strength",
        type=as_number,
        metavar="X",
        help="0..1, how much of it is drawn anew (default: 0.8, or 1 with --mask)",
    )
    add(
        "--mask",
        type=as_place,
        metavar="FILE",
        help="white where the picture of --init is drawn anew, or what --control fills",
    )
    add("--control", type=as_place, metavar="FILE[:SCALE]", help="picture that a ControlNet of the bundle follows")
    add("--control-kind", metavar="NAME", help=f"{', '.join(CONTROLS)} (default: the bundle's only ControlNet)")
    add("--control-filtered", action="store_true", help="--control shows the edges themselves, white on black")
    add(
        "--lora",
        action="append",
        default=[],
        type=as_place,
        metavar="FILE[:SCALE]",
        help="LoRA file to apply; repeatable",
    )
    add(
        "--word",
        action="append",
        default=[],
        type=as_place,
        metavar="FILE[:WORD]",
        help="file of a taught word (textual inversion), and what prompts call it; repeatable",
    )
    add("--reconstruct", type=as_place, metavar="FILE", help="encode a picture and decode it again, and print the PSNR")
    add(
        "--seed",
        type=as_integer,
        metavar="N",
        help="0..2**64-1 (default: a new one); further pictures have N+1, N+2, ...",
    )
    add("--size", metavar="WxH", help="pixels, 64..4096 each (default: the bundle's)")
    add("--steps", type=as_integer, metavar="N", help="Stage C steps")
    add("--guidance", type=as_number, metavar="X", help="Stage C guidance scale; up to 1 is none")
    add("--decoder-steps", type=as_integer, metavar="N", help="Stage B steps")
    add("--decoder-guidance", type=as_number, metavar="X", help="Stage B guidance scale; up to 1 is none")
    add("--negative", metavar="TEXT", help="what to draw away from")
    add(
        "--weighted", action="store_true", help="brackets are weights, as in '(red:1.3) circle'; long prompts in chunks"
    )
    add(
        "--images",
        type=as_integer,
        metavar="N",
        help="how many pictures; -1, -2, ... is added to the name (default: 1)",
    )
    add("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: the bundle's)")
    add("--preset", metavar="NAME", help=f"{', '.join(PRESETS)}: quality against time (default: the bundle's)")
    add("--provider", default="auto", metavar="NAME", help=f"auto, {', '.join(PROVIDERS)} (default: auto)")
    add("--threads", type=as_integer, metavar="N", help="threads within an operator (default: the provider's choice)")
    add("--low-memory", action="store_true", help="keep one engine loaded at a time")
    add("--preview", type=as_path, metavar="DIR", help="write a small picture of every step into a folder")
    add("--json", action="store_true", help="print what ran, with the time of each stage, as JSON")
    add("--quiet", action="store_true", help="no progress bar")
    add("--version", action="version", version=f"cascade-rt {__version__}")
    return parser


def info_parser() -> argparse.ArgumentParser:
    """The command line of ``cascade-info``."""
    parser = CommandParser("cascade-info", "Show what is in an engine bundle.", INFO_EXAMPLES)
    parser.add_argument(
        "bundle", nargs="?", type=as_place, metavar="DIR", help="bundle (default: the one that is shipped)"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest")
    parser.add_argument("--check", action="store_true", help="read every file and compare its hash")
    parser.add_argument("--version", action="version", version=f"cascade-rt {__version__}")
    return parser


def generate(args: argparse.Namespace) -> None:
    """Do what ``cascade-run`` was asked."""
    warnings.showwarning = lambda message, *rest, **more: say_aside(f"warning: {message}")
    if args.reconstruct is not None:
        open_picture("--reconstruct", args.reconstruct)
    request = requested(args)
    check_output(args.output)
    started = time.perf_counter()
    with (
        CascadePipeline.from_pretrained(args.bundle, args.provider, args.low_memory, args.threads) as pipe,
        _folder_of_previews(args.preview),
    ):
        if args.quiet:
            pipe.set_progress_bar_config(disable=True)
        planned = pipe.plan(request)
        out = pipe.run(request, *([None] * 2 if args.preview is None else _preview_writers(args.preview)))
        facts = {"bundle": pipe.bundle.name, "provider": pipe.provider, "software": f"cascade-rt {__version__}"}
    files = write_pictures(out, planned.request, args.output, facts)
    psnr = None if args.reconstruct is None else reconstruction_psnr(args.reconstruct, out)
    seconds = {name: round(value, 4) for name, value in out.timings.items()}
    seconds["total"] = round(time.perf_counter() - started, 4)
    if args.json:
        width, height = out.images[0].size
        report = {**_told(planned.request), **facts, "width": width, "height": height, "files": files}
        print(json.dumps({**report, **({} if psnr is None else {"psnr": psnr}), "seconds": seconds}))
        return
    for file in files:
        print(plain(file))
    if psnr is not None:
        print(f"PSNR of the round trip: {psnr:.2f} dB")
    print("  ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))


def requested(args: argparse.Namespace) -> Request:
    """The request of a command line.

    Raises:
        RequestError: a value that is not accepted, or neither a prompt nor a picture to make again.
    """
    if args.reconstruct is not None and (args.init is not None or args.source is not None):
        raise RequestError("--reconstruct stands alone; leave --init and --from out")
    init = args.reconstruct if args.reconstruct is not None else args.init
    if args.source is None and args.prompt is None and init is None and not args.image and args.control is None:
        raise RequestError("there is no prompt; write what to draw, for example: cascade-run 'a red circle'")
    base = Request() if args.source is None else Request.from_json(read_request(args.source))
    width, height = parse_size(args.size)
    control = None if args.control is None else parse_weighted("--control", args.control)
    count = check_pictures("num_images_per_prompt", given_or(args.images, 1))
    seeds = base.seeds
    if args.seed is not None or args.images is not None or seeds is None:
        first = new_seeds(1)[0] if args.seed is None else check_integer("seeds", args.seed, 0, MAX_SEED)
        if args.seed is None and base.seeds is not None:
            first = base.seeds[0]
        seeds = tuple((first + index) % (MAX_SEED + 1) for index in range(count))
    return replace(
        base,
        prompt=given_or(args.prompt, base.prompt),
        negative_prompt=given_or(args.negative, base.negative_prompt),
        prompt_syntax="weighted" if args.weighted else base.prompt_syntax,
        height=given_or(height, base.height),
        width=given_or(width, base.width),
        num_images_per_prompt=len(seeds),
        seeds=seeds,
        sampler=given_or(args.sampler, base.sampler),
        preset=given_or(args.preset, base.preset),
        images=tuple(ImagePrompt(image=f, weight=w) for f, w in (parse_weighted("--image", x) for x in args.image))
        or base.images,
        init_image=given_or(init, base.init_image),
        strength=0.0 if args.reconstruct is not None else given_or(args.strength, base.strength),
        mask_image=given_or(args.mask, base.mask_image),
        control_image=given_or(None if control is None else control[0], base.control_image),
        control_scale=base.control_scale if control is None else control[1],
        control_kind=given_or(args.control_kind, base.control_kind),
        control_filtered=args.control_filtered or (base.control_filtered and control is None),
        loras=tuple(LoraFile(file=str(x.path), scale=x.scale) for x in map(parse_lora, args.lora)) or base.loras,
        words=tuple(map(parse_word, args.word)) or base.words,
        prior=_loop(base.prior, args.steps, args.guidance),
        decoder=_loop(base.decoder, args.decoder_steps, args.decoder_guidance),
    )


def reconstruction_psnr(source: str, out: CascadeOutput) -> float:
    """PSNR in dB (peak 1) between a picture, cut and resized to what was made, and what was made of it."""
    made = np.asarray(out.images[0], dtype=np.float64) / 255
    wanted = encoder_pixels(open_picture("--reconstruct", source), *made.shape[:2])[0].transpose(1, 2, 0)
    error = float(np.mean((made - wanted) ** 2))
    return round(-10 * math.log10(max(error, 1e-12)), 4)


def _loop(base: LoopSettings, steps: int | None, scale: float | None) -> LoopSettings:
    return replace(
        base,
        num_inference_steps=given_or(steps, base.num_inference_steps),
        guidance_scale=given_or(scale, base.guidance_scale),
    )


def parse_weighted(flag: str, text: str) -> tuple[str, float]:
    """``FILE`` or ``FILE:WEIGHT``; the weight is 1 where there is none.

    Raises:
        RequestError: the weight is no number.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).is_file():
        return text, 1.0
    try:
        return head, float(tail)
    except ValueError:
        what = "scale" if flag == "--control" else "weight"
        raise RequestError(
            f"{flag} {shown(text)}: {shown(tail)} is no {what}; write FILE or FILE:{what.upper()}, for example "
            "photo.jpg:0.8"
        ) from None


def parse_word(text: str) -> WordFile:
    """``FILE``, ``FILE:WORD``, or ``FILE:WORD,WORD`` for a file that teaches several words."""
    head, colon, tail = text.rpartition(":")
    if not colon or word_path(text).is_file():
        return WordFile(file=text)
    return WordFile(file=head, words=tuple(tail.split(",")))


def check_output(path: Path) -> None:
    """Refuse a place that pictures cannot be written to, before any is made.

    Raises:
        RequestError: another ending than those of `FORMATS`, or a folder's name.
        OutputError: its folder is missing, or cannot be written to.
    """
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"-o {name_of(path)} is not accepted; pictures are written as {', '.join(FORMATS)}")
    check_name(path)
    try:
        if path.is_dir():
            raise RequestError(f"{name_of(path)} is a folder; name a file in it")
        if not path.parent.is_dir():
            folder = name_of(path.parent)
            raise OutputError(f"the folder {folder} does not exist; make it with: mkdir -p {folder}")
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError | OutputError):
            raise
        raise OutputError(f"{name_of(path)} cannot be written: {getattr(error, 'strerror', error)}") from None
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"the folder {name_of(path.parent)} cannot be written to")


@contextmanager
def _folder_of_previews(path: Path | None) -> Iterator[None]:
    """A folder that previews are written into; where it is made here, it is removed again if nothing came into it.

    Raises:
        OutputError: it cannot be made, or cannot be written to.
    """
    if path is None:
        yield
        return
    try:
        there = path.is_dir()
        path.mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"the folder {name_of(path)} cannot be made: {said_by(error)}") from None
    try:
        if not os.access(path, os.W_OK):
            raise OutputError(f"the folder {name_of(path)} cannot be written to")
        yield
    finally:
        if not there:
            with suppress(OSError):  # there are previews in it
                path.rmdir()


def _preview_writers(folder: Path) -> tuple[StepEnd, StepEnd]:
    """What writes ``c-01.png``, ... and ``b-01.png``, ... into a folder; several pictures stand side by side."""

    def writer(stage: str) -> StepEnd:
        def write(_pipe: Any, step: int, _ratio: float, tensors: dict[str, Any]) -> None:
            previews = tensors["preview"]
            width, height = previews[0].size
            sheet = PIL.Image.new("RGB", (width * len(previews), height))
            for index, preview in enumerate(previews):
                sheet.paste(preview, (width * index, 0))
            with written_whole(folder / f"{stage}-{step + 1:02}.png") as file:
                sheet.save(file, format="PNG")

        return StepEnd(None, write, ("preview",))

    return writer("c"), writer("b")


def write_pictures(out: CascadeOutput, request: Request, path: Path, facts: dict[str, str]) -> list[str]:
    """Write all pictures or none; each carries the request that makes it alone.

    Args:
        out: what was made.
        request: the planned one, with every default filled in.
        path: of one picture; ``-1``, ``-2``, ... is added to the names of several.
        facts: what else a PNG says of itself.

    Returns:
        The files' names.
    """
    contents: dict[Path, bytes] = {}
    for index, image in enumerate(out.images):
        assert request.seeds is not None  # a planned request has them
        alone = replace(request, num_images_per_prompt=1, seeds=(request.seeds[index],))
        place = path if len(out.images) == 1 else path.with_stem(f"{path.stem}-{index + 1}")
        texts = {key: str(value) for key, value in {**_told(alone), **facts}.items()}
        contents[place] = encode_picture(image, path.suffix.lower(), alone.to_json(), texts)
    write_together(contents)
    return [str(place) for place in contents]


def _told(request: Request) -> dict[str, Any]:
    """What made a picture, in the command line's words."""
    seeds = request.seeds or ()
    return {
        "prompt": request.prompt,
        "negative_prompt": given_or(request.negative_prompt, ""),
        "seed": seeds[0],
        "sampler": request.sampler,
        "steps": request.prior.num_inference_steps,
        "guidance": request.prior.guidance_scale,
        "decoder_steps": request.decoder.num_inference_steps,
        "decoder_guidance": request.decoder.guidance_scale,
    }


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """``WxH`` -> (width, height).

    Raises:
        RequestError: it is not of that form.
    """
    if text is None:
        return None, None
    if not (match := re.fullmatch(r"(-?[0-9]{1,9})x(-?[0-9]{1,9})", text)):
        raise RequestError(f"--size {shown(text)} is not accepted; write it as WIDTHxHEIGHT, for example 1024x1024")
    return int(match[1]), int(match[2])


def show(args: argparse.Namespace) -> None:
    """Do what ``cascade-info`` was asked."""
    bundle = find_bundle(args.bundle)
    manifest = bundle.manifest
    if args.check:
        for name in manifest.files:
            bundle.file(name)
    if args.json:
        print(manifest.to_json(), end="")
        return
    m = manifest.model
    print(plain(f"{m.name} ({m.size}), from {m.source}; weights: {m.licence}"))
    print(f"{m.width} x {m.height} px; samplers: {', '.join(manifest.sampling)}, default {m.default_sampler}")
    total = sum(file.bytes for file in manifest.files.values())
    print(f"{len(manifest.files)} files, {total / 2**20:.1f} MiB" + (", all hashes right" if args.check else ""))
    rows = [("engine", "features", "runtime", "precision", "rel. L2", "max", "cosine", "PSNR", "inputs")]
    for record in manifest.engines:
        inputs = ", ".join(f"{t.name}[{' x '.join(map(str, t.axes))}]" for t in record.inputs)
        runtime = " ".join([record.runtime, *(f"sm{number}" for number in record.sm)])
        features = ",".join(record.features)
        rows.append((record.name, features, runtime, record.precision.name, *_figures(record.verification), inputs))
        if record.verification is not None and (loop := record.verification.loop) is not None:
            how = f"{loop.sampler} sampler, {loop.steps} steps, guidance {loop.guidance_scale:g}"
            rows.append(("  its whole loop", "", "", "", *_figures(loop), how))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] + [0]
    shown_columns = [i for i in range(len(widths)) if i != 1 or any(row[1] for row in rows[1:])]
    for row in rows:
        print("  ".join(row[i].ljust(widths[i]) for i in shown_columns))
    print("figures: against fp32 PyTorch")
    for name, model in manifest.models.items():
        if model.loras:
            print(plain(f"{name}: with {', '.join(model.loras)}"))
        if (scan := model.stream_scales) is not None:
            print(
                f"{name}: residual stream kept divided by {list(scan.down)} on the way down and {list(scan.up)} on the "
                f"way up; largest values seen {list(scan.largest_down)} and {list(scan.largest_up)} "
                "(fp16 ends at 65504)"
            )
        for precision, found in model.quantised.items():
            print(
                f"{name} in {precision}: {found.layers} linear layers in 8 bits, their products up to "
                f"{found.largest_error:.1e} from exact; {len(found.wide)} kept wide"
            )
            for layer, reason in found.wide.items():
                print(plain(f"  {layer}: {reason}"))


def _figures(figures: Figures | None) -> tuple[str, str, str, str]:
    """Relative L2, largest difference, cosine and PSNR, as `cascade-info` prints them."""
    if figures is None:
        return "not verified", "", "", ""
    psnr = "" if figures.psnr is None else f"{figures.psnr:.1f} dB"
    return f"{figures.rel_l2:.1e}", f"{figures.max_abs:.1e}", f"{figures.cosine:.8f}", psnr
