"""What the shipped cascade draws, without torch: against a picture that was looked at, and told by the judge."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cascade_rt import CascadePipeline, Request
from cascade_tiny.judge import judge
from cascade_tiny.scenes import Wish, canonical

GOLDEN = Path(__file__).parent / "golden.png"
"""The first wishes below, `SIDE` pixels wide each; written by `thumbnails` when a better cascade is shipped."""
SIDE = 32
SETTINGS: dict[str, Any] = {
    "sampler": "original",
    "prior_num_inference_steps": 20,
    "num_inference_steps": 10,
    "prior_guidance_scale": 1.5,
    "decoder_guidance_scale": 1.0,
    "output_type": "np",
}
"""Written out, so that other defaults of the bundle do not change the picture."""
WISHES = (
    Wish("red", "circle", "large", "left", "blue"),
    Wish("yellow", "star", "large", "center", "black"),
    Wish("green", "square", "large", "right", "white"),
)
MEAN, MOST = 1.5, 24.0
"""Tolerances in levels of 255: the mean and the largest difference that providers and processors may make."""

Array = NDArray[np.float32]


@functools.cache
def drawn(pipe: CascadePipeline, seed: int = 0) -> Array:
    """The wishes, one picture each, ``[3, 256, 256, 3]``."""
    prompts = [canonical(wish) for wish in WISHES]
    seeds = [seed + index for index in range(len(prompts))]
    images: Array = pipe(prompts, seed=seeds, **SETTINGS).images
    return images


def thumbnails(images: Array) -> Array:
    """Means over blocks of pixels, side by side, in levels of 255: ``[SIDE, 3 * SIDE, 3]``."""
    block = images.shape[1] // SIDE
    small = images.reshape(len(images), SIDE, block, SIDE, block, 3).mean(axis=(2, 4))
    return np.concatenate(list(small), axis=1) * 255


def distances(images: Array) -> tuple[float, float]:
    """Mean and largest difference from the golden thumbnails, in levels of 255."""
    golden = np.asarray(Image.open(GOLDEN).convert("RGB"), dtype=np.float32)
    difference = np.abs(thumbnails(images) - golden)
    return float(difference.mean()), float(difference.max())


def test_the_pictures_are_those_that_were_looked_at(pipe: CascadePipeline) -> None:
    mean, most = distances(drawn(pipe))
    assert mean <= MEAN
    assert most <= MOST


def test_the_comparison_can_fail(pipe: CascadePipeline) -> None:
    images = drawn(pipe)
    for other in (
        drawn(pipe, seed=9),
        images[..., ::-1],
        images[::-1],
        images[:, ::-1],
        images[:, :, ::-1],
        images * 0.95,
    ):
        assert distances(other)[0] > 2 * MEAN


def test_the_judge_sees_what_was_asked_for(pipe: CascadePipeline) -> None:
    for picture, wish in zip(drawn(pipe), WISHES, strict=True):
        assert judge(picture, wish).right, wish
    for picture, wish in zip(np.roll(drawn(pipe), 1, axis=0), WISHES, strict=True):
        assert not judge(picture, wish).colour_at_place, "another wish's picture"


def test_without_stage_c_nothing_is_seen(pipe: CascadePipeline) -> None:
    """The prompt's way into the picture is Stage C's latents; what Stage B is told of it draws no shape."""
    empty = np.zeros((len(WISHES), 16, 6, 6), np.float32)
    images = pipe.decoder(empty, [canonical(wish) for wish in WISHES], seed=0, output_type="np").images
    assert not any(judge(picture, wish).right for picture, wish in zip(images, WISHES, strict=True))


@pytest.mark.parametrize("sampler", ["original", "diffusers"])
def test_both_samplers_draw_the_wish(pipe: CascadePipeline, sampler: str) -> None:
    request = Request(prompt=canonical(WISHES[0]), seeds=(5,), sampler=sampler, output_type="np")  # type: ignore[arg-type]
    (picture,) = pipe.run(request).images
    verdict = judge(np.asarray(picture), WISHES[0])
    assert verdict.background
    assert verdict.colour_at_place
