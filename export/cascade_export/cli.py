"""``cascade-export``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cascade_rt
from cascade_rt.bundle import Bundle, find_bundle
from cascade_rt.commands import CommandParser, as_path, as_place, run_command
from cascade_rt.errors import RequestError, plain, shown
from cascade_rt.lora import parse_lora
from cascade_rt.manifest import MANIFEST
from cascade_rt.serve.triton import write_repository
from cascade_rt.stages import PRECISIONS, SIZES, Precision, Size, StageName, stage_names

if TYPE_CHECKING:
    from .hub import Publication

EXAMPLES = """examples:
  cascade-export --stage all --size tiny
  cascade-export --stage c --size big
  cascade-export --stage all --checkpoint path/to/diffusers-folder --precision fp32 --out my-bundle
  cascade-export --stage c --size big --checkpoint random:0 --no-verify
  cascade-export --stage c --size big --lora style.safetensors:0.8 --out cascade-big-style
  cascade-export --stage all --size tiny --precision fp16 --target tensorrt-rtx --sm 86,89,120
  cascade-export --stage c --size big --control --out cascade-big
  cascade-export --stage canny --checkpoint controlnet/canny.safetensors --out cascade-big
  cascade-export --triton model-repository --out my-bundle
  cascade-export --push-to-hub me/my-cascade --out my-bundle
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(
        "cascade-export", "Export stages of Stable Cascade to ONNX and TensorRT, into an engine bundle.", EXAMPLES
    )
    parser.add_argument(
        "--checkpoint",
        type=as_place,
        metavar="PLACE",
        help="diffusers folder, original or ComfyUI .safetensors, bundle, hub id, or random:SEED "
        "(default: the size's official weights; tiny: the shipped ones)",
    )
    parser.add_argument("--out", type=as_path, metavar="DIR", help="bundle to make or add to (default: ./cascade-SIZE)")
    add_export_options(parser)
    parser.add_argument(
        "--triton",
        type=as_path,
        metavar="DIR",
        help="write a Triton model repository of the bundle; without --stage: of the one at --out (default: shipped)",
    )
    hub = parser.add_argument_group("the hub", "What becomes of a bundle that is published.")
    hub.add_argument(
        "--push-to-hub",
        type=as_place,
        metavar="OWNER/NAME",
        help="upload the bundle with a model card; without --stage: the one at --out (default: shipped)",
    )
    hub.add_argument(
        "--private", action="store_true", help="the repository is private; needed for the official weights"
    )
    hub.add_argument(
        "--licence", type=as_place, metavar="NAME", help="of the weights, where the checkpoint does not say: apache-2.0"
    )
    hub.add_argument("--no-pictures", action="store_true", help="draw no pictures for the model card")
    parser.add_argument("--version", action="version", version=f"cascade-rt {cascade_rt.__version__}")
    args = parser.parse_args(argv)
    if not args.stage and args.triton is None and args.push_to_hub is None:
        parser.error("the following arguments are required: --stage")
    if args.push_to_hub is None and (args.private or args.licence or args.no_pictures):
        parser.error("--private, --licence and --no-pictures are of --push-to-hub OWNER/NAME")
    return args


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """What an export takes but for where it reads and writes; ``optimum-cli export cascade`` takes the same."""
    parser.add_argument(
        "--stage",
        action="append",
        choices=(*stage_names(), "all"),
        default=[],
        help="what to export; repeatable; all: everything that the checkpoint has",
    )
    parser.add_argument("--size", choices=SIZES, help="official size (default: tiny where no checkpoint is named)")
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        help="of weights and wide activations (default: bf16 for small and big, else fp32); int8: linear layers in 8 "
        "bits for ONNX Runtime and OpenVINO; w8: their weights alone, smaller and not faster; "
        "int8-static and fp8: with scales found at export, for TensorRT",
    )
    parser.add_argument(
        "--target",
        action="append",
        choices=("onnx", "tensorrt", "tensorrt-rtx"),
        help="engine runtime, repeatable (default: onnx); tensorrt builds on this machine's GPU, "
        "tensorrt-rtx without one",
    )
    parser.add_argument(
        "--sm",
        metavar="86,89,120",
        help="compute capabilities that tensorrt-rtx builds for (default: 80,86,89,120)",
    )
    parser.add_argument(
        "--shapes",
        default="default",
        metavar="SHAPES",
        help="sizes that engine files take: default (half to one and a half times the bundle's own picture size, "
        "batch 1 to 8), full (all that the graph takes), square-PIXELS, and AXIS=MIN:OPT:MAX or "
        "ENGINE.AXIS=..., separated by commas, for example square-1024,batch=2:2:4",
    )
    parser.add_argument(
        "--lora",
        action="append",
        type=as_place,
        default=[],
        metavar="FILE[:SCALE]",
        help="fold a LoRA into the weights, times SCALE (default: 1); repeatable; the authors', kohya's and PEFT's "
        "files are read",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="make Stage C's engines that take a ControlNet too, beside the plain ones (--stage all: where the "
        "checkpoint has a ControlNet)",
    )
    parser.add_argument(
        "--control-blocks",
        type=_blocks,
        metavar="0,4,8,...",
        help="residual blocks of Stage C that take a ControlNet's residuals, counted in the order of execution "
        "(default: the checkpoint's, or those of the published ControlNets)",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare with fp32 PyTorch")
    parser.add_argument("--overwrite", action="store_true", help="replace stages that the bundle has already")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks."""
    publication = None
    if args.push_to_hub is not None:
        from .hub import Publication

        publication = Publication(
            repo=args.push_to_hub,
            private=args.private,
            licence=args.licence,
            pictures=not args.no_pictures,
            quiet=args.quiet,
        )
    bundle = make_bundle(args, publication) if args.stage else find_bundle(args.out)
    if args.triton is not None:
        for model in write_repository(bundle, args.triton):
            _say(f"model: {model}")
    if publication is not None:
        _say(f"published: {publication.push(bundle, _say)}")


def make_bundle(args: argparse.Namespace, publication: Publication | None = None) -> Bundle:
    """Export what the command line names.

    Args:
        args: of `parse_args`, or of ``optimum-cli export cascade``.
        publication: what is done with the bundle afterwards, which may refuse the checkpoint's licence now.
    """
    try:
        from .staging import check_current_folder

        check_current_folder()
        from .catalog import CONTROL
        from .checkpoints import open_checkpoint
        from .exporter import export
        from .job import ExportRequest, own_precision
        from .lora import with_loras
        from .shape_options import parse_shapes
        from .targets import ONNX, resolve_targets
    except ImportError as error:
        raise RequestError(
            f"cascade-export needs {error.name}; install it with: pip install 'cascade-rt[export,onnxruntime]'"
        ) from error
    size: Size | None = args.size if args.size or args.checkpoint else "tiny"
    every = "all" in args.stage
    stages: tuple[StageName, ...] = stage_names() if every else tuple(dict.fromkeys(args.stage))
    out = args.out if args.out is not None else Path(f"cascade-{size or 'custom'}")
    targets = resolve_targets(args.target or ["onnx"], args.sm)
    shapes = parse_shapes(args.shapes)
    own = None
    loras = [parse_lora(text) for text in args.lora]
    # a LoRA belongs to the checkpoint's own weights: the bundle's may hold it already
    if args.checkpoint is None and not loras and ONNX not in targets and _is_bundle(out):
        own = own_precision(Bundle(out).manifest, stages)
    if args.precision is not None:
        precision = PRECISIONS[args.precision]
    else:
        precision = own or PRECISIONS["bf16" if size in ("small", "big") else "fp32"]
    # engine files are added to a bundle from what it holds already, unless another checkpoint is named
    checkpoint = with_loras(open_checkpoint(str(out) if own else args.checkpoint, size), loras, stages, _say)
    if publication is not None:
        publication.check_licence(checkpoint.facts.licence, checkpoint.facts.source)
    request = ExportRequest(
        stages=stages,
        precision=precision,
        out=out,
        skip_absent=every,
        verify=not args.no_verify,
        overwrite=args.overwrite,
        quiet=args.quiet,
        targets=targets,
        shapes=shapes,
        control_blocks=args.control_blocks,
    )
    controlled = replace(request, stages=("c",), features=(CONTROL,))
    if args.control and "c" not in stages:
        raise RequestError("--control is for Stage C's engines; add --stage c")
    if args.control and stages == ("c",) and _has_stage_c(out, precision) and not args.overwrite:
        bundle = export(checkpoint, controlled, _say)  # the plain ones are there
    else:
        bundle = export(checkpoint, request, _say)
        if args.control or (every and _has_controlnet(bundle)):
            bundle = export(checkpoint, controlled, _say)
    _say(f"bundle: {bundle.path}")
    return bundle


def _has_stage_c(out: Path, precision: Precision) -> bool:
    """Whether a bundle has the plain graphs of Stage C."""
    return _is_bundle(out) and any(
        r.precision == precision for r in Bundle(out).manifest.records("stage_c.step", "onnx")
    )


def _has_controlnet(bundle: Bundle) -> bool:
    """Whether a bundle has a ControlNet, and a Stage C for it."""
    models = bundle.manifest.models
    return "stage_c" in models and any(name.startswith("controlnet_") for name in models)


def _blocks(text: str) -> tuple[int, ...]:
    """``0,4,8``.

    Raises:
        ArgumentTypeError: it is something else.
    """
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4}){0,255}", text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no list of block numbers; write for example 0,4,8,12")
    return tuple(map(int, text.split(",")))


def _say(text: str) -> None:
    """Print lines without the control characters that names may hold."""
    print("\n".join(map(plain, text.split("\n"))))


def _is_bundle(out: Path) -> bool:
    try:
        return (out / MANIFEST).is_file()
    except (OSError, ValueError):  # a name that is too long, or none that the system takes: `export` says so
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(lambda: run(parse_args(argv)), ends=argv is None)


if __name__ == "__main__":
    sys.exit(main())
