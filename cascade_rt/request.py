"""What a caller may ask for: prompts, sizes, scales. Each check names the value and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import ModelFacts
from .errors import RequestError
from .sampling import SamplerName

Array = NDArray[np.float32]

MIN_PIXELS = 64
MAX_PIXELS = 4096
MAX_GUIDANCE = 1000
OUTPUT_TYPES = ("pil", "np", "latent")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one picture at every stage, each (height, width).

    Attributes:
        prior: Stage C's latents.
        decoder: Stage B's latents.
        picture: what is returned: the decoded picture, cropped to the request.
    """

    prior: tuple[int, int]
    decoder: tuple[int, int]
    picture: tuple[int, int]


def check_pixels(name: str, size: Any) -> int:
    """A picture's height or width.

    Raises:
        RequestError: no integer, or outside 64..4096.
    """
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or not MIN_PIXELS <= size <= MAX_PIXELS:
        raise RequestError(f"{name} {size!r} is not accepted; it must be an integer from {MIN_PIXELS} to {MAX_PIXELS}")
    return int(size)


def plan_sizes(facts: ModelFacts, grids: tuple[int, int], sampler: SamplerName, height: Any, width: Any) -> Sizes:
    """Sizes of all stages for a requested picture.

    Stage C's latents are the request over ``resolution_multiple``, rounded up, as in both sources. Stage B's must
    divide evenly through its levels. diffusers takes their size from Stage C's and lets levels of odd size be
    resampled, where it does not fail; the ``diffusers`` sampler here follows it where they divide evenly. Otherwise
    the size comes from the pixels, as in the authors' code, rounded up, and the picture is cropped.

    Args:
        facts: compressions of the cascade.
        grids: what height and width of Stage C's and of Stage B's latents must be multiples of.
        sampler: whose sizes to follow.
        height: requested pixels.
        width: requested pixels.

    Raises:
        RequestError: a size that is not accepted.
    """
    axes = [
        _plan_axis(facts, grids, sampler, check_pixels(name, size))
        for name, size in (("height", height), ("width", width))
    ]
    prior, decoder, picture = ((axes[0][i], axes[1][i]) for i in range(3))
    return Sizes(prior, decoder, picture)


def _plan_axis(facts: ModelFacts, grids: tuple[int, int], sampler: SamplerName, pixels: int) -> tuple[int, int, int]:
    prior = round_up(math.ceil(pixels / facts.resolution_multiple), grids[0])
    decoder = int(prior * facts.latent_dim_scale)
    agree = abs(facts.latent_dim_scale * facts.compression / facts.resolution_multiple - 1) < 0.02
    if not agree:  # a decoder with a scale of its own: what it makes of the prior's latents is the picture
        return prior, round_up(decoder, grids[1]), decoder * facts.compression
    if sampler != "diffusers" or decoder % grids[1]:
        decoder = round_up(math.ceil(pixels / facts.compression), grids[1])
    return prior, decoder, min(pixels, decoder * facts.compression)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below ``size``."""
    return -(-size // multiple) * multiple


def as_prompts(name: str, prompt: Any) -> list[str]:
    """One prompt or a list of them, as a list.

    Raises:
        RequestError: neither a string nor a non-empty list of strings.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, Sequence) and prompt and all(isinstance(p, str) for p in prompt):
        for text in prompt:
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise RequestError(f"{name} {text!r} is no Unicode text (it has bytes that are not UTF-8)")
        return list(prompt)
    if isinstance(prompt, Sequence) and prompt:
        odd = next(p for p in prompt if not isinstance(p, str))
        raise RequestError(f"{name} has an entry of type {type(odd).__name__} ({odd!r}); every entry must be a string")
    raise RequestError(f"{name} {prompt!r} is not accepted; it must be a string or a non-empty list of strings")


def check_scale(name: str, scale: Any) -> float:
    """A guidance scale.

    Raises:
        RequestError: no finite number.
    """
    number = isinstance(scale, int | float | np.number) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale) or abs(scale) > MAX_GUIDANCE:
        raise RequestError(
            f"{name} {scale!r} is not accepted; it must be a finite number up to {MAX_GUIDANCE} "
            "(up to 1 means no guidance)"
        )
    return float(scale)


def check_count(name: str, count: Any) -> int:
    """A number of pictures.

    Raises:
        RequestError: no positive integer.
    """
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise RequestError(f"{name} {count!r} is not accepted; it must be a positive integer")
    return int(count)


def check_batch(pictures: int, guided: bool, most: int) -> None:
    """Whether engines take so many pictures at once.

    Raises:
        RequestError: they do not.
    """
    rows = pictures * (2 if guided else 1)
    if rows > most:
        twice = f", {rows} rows with guidance," if guided else ""
        raise RequestError(f"{pictures} pictures at once{twice} are not accepted; these engines take up to {most} rows")


def check_choice(name: str, value: Any, accepted: Sequence[str]) -> str:
    """One of several words.

    Raises:
        RequestError: another word.
    """
    if not isinstance(value, str) or value not in accepted:
        raise RequestError(f"{name} {value!r} is not known; accepted: {', '.join(accepted)}")
    return value


def as_array(name: str, value: Any, shape: tuple[int | None, ...]) -> Array:
    """A caller's tensor as float32, of exactly ``shape`` (None: any size) and finite.

    Raises:
        RequestError: another shape, no numbers, or NaN or infinity among them.
    """
    try:
        array = np.ascontiguousarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} of type {type(value).__name__} is no array of numbers: {error}") from error
    fits = len(array.shape) == len(shape) and all(s is None or s == a for s, a in zip(shape, array.shape, strict=True))
    if not fits:
        wanted = tuple("any" if s is None else s for s in shape)
        raise RequestError(f"{name} has shape {array.shape}; it must be {wanted}")
    if not np.isfinite(array).all():
        raise RequestError(f"{name} holds NaN or infinity")
    return array
