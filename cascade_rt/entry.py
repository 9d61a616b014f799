"""Entry points of ``cascade-run`` and ``cascade-info``; NumPy is imported once Ctrl-C is answered with one line."""

from __future__ import annotations

from collections.abc import Sequence

from .commands import run_command

FLAGS = {
    "prompt": "PROMPT",
    "negative_prompt": "--negative",
    "height": "--size: height",
    "width": "--size: width",
    "num_images_per_prompt": "--images",
    "seeds": "--seed",
    "sampler": "--sampler",
    "preset": "--preset",
    "provider": "--provider",
    "threads": "--threads",
    "prior.num_inference_steps": "--steps",
    "prior.guidance_scale": "--guidance",
    "decoder.num_inference_steps": "--decoder-steps",
    "decoder.guidance_scale": "--decoder-guidance",
    "images": "--image",
    "loras": "--lora",
    "words": "--word",
    "init_image": "--init",
    "strength": "--strength",
    "mask_image": "--mask",
    "control_image": "--control",
    "control_scale": "--control: scale",
    "control_kind": "--control-kind",
    "control_filtered": "--control-filtered",
}
"""Field of a `Request` -> what the command line calls it."""


def main_run(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cascade-run``; returns the exit code."""

    def command() -> None:
        from . import cli

        cli.generate(cli.run_parser().parse_args(argv))

    return run_command(command, FLAGS, ends=argv is None)


def main_info(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cascade-info``; returns the exit code."""

    def command() -> None:
        from . import cli

        cli.show(cli.info_parser().parse_args(argv))

    return run_command(command, ends=argv is None)
