"""How well cascade-tiny follows captions: measured through the runtime, on captions that training never saw.

    python benchmarks/tiny_accuracy.py --pictures 436 --json tiny_accuracy.json

Every picture has a seed of its own. Reconstruction (semantic encoder -> Stage B -> Stage A) is measured where the
bundle has an `effnet_encoder`. The last line on standard output is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from cascade_rt import CascadeError, CascadePipeline
from cascade_tiny import scenes
from cascade_tiny.judge import Picture, Verdict, judge, psnr
from cascade_tiny.scenes import Scene, Wish

# Each goal is a share of the pictures, except the last, which is in dB.
GOALS = {"valid": 1.0, "background": 0.98, "colour_at_place": 0.95, "shape": 0.90, "reconstruction_db": 24.0}
STRANGE = ("a photograph of a fox in the snow", "", "ein rotes Fahrrad", "🦊" * 40)


def share(verdicts: list[Verdict]) -> dict[str, float]:
    """The share of pictures that are right, for each thing judged."""
    names = ("valid", "background", "colour_at_place", "shape", "size", "right")
    return {name: round(float(np.mean([getattr(v, name) for v in verdicts])), 4) for name in names}


def generate(
    pipe: CascadePipeline, captions: list[str], first_seed: int, options: dict[str, Any], bar: bool
) -> list[Picture]:
    """One picture a caption, each with its own seed: float32 [256, 256, 3] in 0..1."""
    made: list[Picture] = []
    for i, caption in enumerate(tqdm(captions, desc="pictures", unit="picture", disable=None if bar else True)):
        out = pipe(caption, seed=first_seed + i, output_type="np", **options)
        made.append(np.asarray(out.images, np.float32)[0])
    return made


def reconstruct(pipe: CascadePipeline, scene: Scene, seed: int) -> float:
    """PSNR in dB of a drawn scene after the semantic encoder, Stage B and Stage A."""
    drawn = scenes.draw(scene)
    # three quarters of the side: what the semantic encoder was trained on
    small = Image.fromarray(drawn).resize((scenes.SIDE * 3 // 4,) * 2, Image.Resampling.BILINEAR)
    pixels = np.ascontiguousarray(np.asarray(small, np.float32).transpose(2, 0, 1)[None] / np.float32(255))
    semantic = encode(pipe, pixels)
    out = pipe.decoder(semantic, prompt="", seed=seed, output_type="np")
    return psnr(np.asarray(out.images, np.float32)[0], drawn.astype(np.float32) / np.float32(255))


def vary(pipe: CascadePipeline, originals: list[Scene], first_seed: int) -> list[Verdict]:
    """Variations of drawn scenes, without a caption: colours and shape count, and not where the shape stands."""
    verdicts = []
    for i, scene in enumerate(originals):
        picture = Image.fromarray(scenes.draw(scene))
        out = pipe(None, picture, seed=first_seed + i, output_type="np")
        wish = Wish(scene.shapes[0].colour, scene.shapes[0].kind, background=scene.background)
        verdicts.append(judge(np.asarray(out.images, np.float32)[0], wish))
    return verdicts


def follow(pipe: CascadePipeline, originals: list[Scene], first_seed: int, scale: float) -> list[Verdict]:
    """Pictures that follow the edges of drawn scenes, with captions of other colours.

    Args:
        pipe: over a bundle with a canny ControlNet.
        originals: whose edges are found.
        first_seed: of the first picture.
        scale: of the ControlNet; 0: the captions alone, which do not say where the shape stands.
    """
    verdicts, rng = [], np.random.default_rng(3)
    for i, scene in enumerate(originals):
        colour, background = (str(name) for name in rng.choice(list(scenes.COLOURS), 2, replace=False))
        caption = f"a {colour} {scene.shapes[0].kind} on a {background} background"
        picture = Image.fromarray(scenes.draw(scene))
        out = pipe(caption, seed=first_seed + i, control_image=picture, control_scale=scale, output_type="np")
        asked = replace(scene, shapes=(replace(scene.shapes[0], colour=colour),), background=background)
        verdicts.append(judge(np.asarray(out.images, np.float32)[0], asked))
    return verdicts


def encode(pipe: CascadePipeline, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Semantic latents float32 [1, 16, 6, 6] of pixels float32 [1, 3, 192, 192] in 0..1."""
    return pipe.run_engine("effnet_encoder", {"pixels": pixels})["latents"]


def write_sheet(path: Path, made: list[Picture], wishes: list[Wish]) -> None:
    """Draws the first twelve captions at half size: above what each means, below what was made of it."""
    rng = np.random.default_rng(7)
    columns, side = 6, scenes.SIDE // 2
    sheet = Image.new("RGB", (columns * side, 4 * side))
    for i, (picture, wish) in enumerate(zip(made[: 2 * columns], wishes, strict=False)):
        meant = Image.fromarray(scenes.draw(scenes.scene_of(wish, rng)))
        shown = Image.fromarray((picture * 255 + 0.5).astype(np.uint8))
        for below, image in enumerate((meant, shown)):
            place = (i % columns * side, (i // columns * 2 + below) * side)
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), place)
    sheet.save(path)


def relations(count: int) -> list[tuple[str, Scene]]:
    """Captions of two and three shapes that say everything, and scenes that fulfil them."""
    rng = np.random.default_rng(977)
    found: list[tuple[str, Scene]] = []
    while len(found) < count:
        scene = scenes.sample(rng)
        if len(scene.shapes) > 1:
            caption = scenes.caption(scene, rng)
            if caption.endswith(" background") and scene.shapes[0].size in caption:
                found.append((caption, scene))
    return found


def measure(pipe: CascadePipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the model card."""
    options = {
        "sampler": arguments.sampler,
        "prior_num_inference_steps": arguments.steps,
        "num_inference_steps": arguments.decoder_steps,
        "prior_guidance_scale": arguments.guidance,
        "decoder_guidance_scale": arguments.decoder_guidance,
    }
    held_out = scenes.held_out_wishes()
    wishes: list[Wish] = [held_out[i % len(held_out)] for i in range(arguments.pictures)]
    bar = not arguments.quiet
    warm = pipe("a red circle", seed=0, output_type="np", **options)
    made = generate(pipe, [scenes.canonical(w) for w in wishes], arguments.seed, options, bar)
    if arguments.sheet:
        write_sheet(arguments.sheet, made, wishes)
    verdicts = [judge(m, w) for m, w in zip(made, wishes, strict=True)]
    result: dict[str, Any] = {"pictures": len(made), **share(verdicts)}
    by_kind = {k: [v.shape for v, w in zip(verdicts, wishes, strict=True) if w.kind == k] for k in scenes.SHAPES}
    result["shape_by_kind"] = {k: round(float(np.mean(v)), 3) for k, v in by_kind.items() if v}

    short = [Wish(w.colour, w.kind) for w in wishes[:40]]
    drawn = generate(pipe, [scenes.canonical(w) for w in short], arguments.seed, options, bar)
    result["short_captions"] = share([judge(m, w) for m, w in zip(drawn, short, strict=True)])

    several = relations(arguments.pictures // 4)
    drawn = generate(pipe, [c for c, _ in several], arguments.seed, options, bar)
    result["two_and_three_shapes"] = share([judge(m, s) for m, (_, s) in zip(drawn, several, strict=True)])

    again = np.asarray(pipe("a red circle", seed=0, output_type="np", **options).images)
    other = np.asarray(pipe("a red circle", seed=1, output_type="np", **options).images)
    result["same_seed_same_bytes"] = np.asarray(warm.images).tobytes() == again.tobytes()
    result["other_seed_difference"] = round(float(np.abs(again - other).mean()), 4)
    strange = generate(pipe, list(STRANGE), 5, options, False)
    result["strange_prompts_valid"] = all(np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1 for p in strange)

    times = []
    for i in range(10):
        begun = time.perf_counter()
        pipe("a large red star at the left on a blue background", seed=i, output_type="np", **options)
        times.append(time.perf_counter() - begun)
    result["seconds_a_picture"] = {
        "median": round(float(np.median(times)), 3),
        "p10": round(float(np.quantile(times, 0.1)), 3),
        "p90": round(float(np.quantile(times, 0.9)), 3),
    }
    rng = np.random.default_rng(56)
    originals = [scenes.scene_of(w, rng) for w in held_out[: arguments.features]]
    if originals and pipe.bundle.manifest.records("image_encoder"):
        result["variations"] = share(vary(pipe, originals, arguments.seed))
    if originals and pipe.bundle.manifest.records("controlnet.canny"):
        result["canny"] = share(follow(pipe, originals, arguments.seed, 1.0))
        result["canny_without_the_controlnet"] = share(follow(pipe, originals, arguments.seed, 0.0))
    if arguments.reconstructions and pipe.bundle.manifest.records("effnet_encoder"):
        rng = np.random.default_rng(55)
        originals = [scenes.scene_of(w, rng) for w in held_out[: arguments.reconstructions]]
        quality = [reconstruct(pipe, s, i) for i, s in enumerate(originals)]
        result["reconstruction_db"] = round(float(np.mean(quality)), 2)
        result["reconstruction_worst_db"] = round(float(np.min(quality)), 2)
    else:
        result["reconstruction_db"] = None
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0: every goal was met, 1: one was not, or the work failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="bundle to measure (default: the shipped one)")
    parser.add_argument("--pictures", type=int, default=436, help="held-out captions, each with its own seed")
    parser.add_argument("--reconstructions", type=int, default=60, help="held-out scenes to encode and decode")
    parser.add_argument("--features", type=int, default=64, help="held-out scenes to vary, and to take edges from")
    parser.add_argument("--seed", type=int, default=1000, help="the first picture's seed")
    parser.add_argument("--sampler", choices=("diffusers", "original"), help="default: the bundle's")
    parser.add_argument("--steps", type=int, help="Stage C steps (default: the bundle's)")
    parser.add_argument("--guidance", type=float, help="Stage C guidance (default: the bundle's)")
    parser.add_argument("--decoder-steps", type=int, help="Stage B steps (default: the bundle's)")
    parser.add_argument("--decoder-guidance", type=float, help="Stage B guidance (default: the bundle's)")
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write the first twelve pictures there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    if arguments.pictures < 4:
        parser.error(f"--pictures {arguments.pictures}: at least 4 are needed")
    try:
        with CascadePipeline.from_pretrained(arguments.bundle, provider=arguments.provider) as pipe:
            pipe.set_progress_bar_config(disable=True)
            result = measure(pipe, arguments)
    except CascadeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    missed = [name for name, goal in GOALS.items() if result[name] is not None and result[name] < goal]
    result["missed"] = missed
    for name, goal in GOALS.items():
        print(f"{name:20} {result[name]!s:>8}   goal {goal}{'   MISSED' if name in missed else ''}", file=sys.stderr)
    text = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
