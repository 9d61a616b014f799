"""Checks of single values: each names the field, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError, plain, refused, shortened, shown
from .noise import MAX_SEED

Array = NDArray[np.float32]

MIN_PIXELS = 64
MAX_PIXELS = 4096
MAX_GUIDANCE = 1000
MAX_PICTURES = 1024
MAX_PROMPT_CHARACTERS = 100_000
MAX_WORD_LENGTH = 100
MAX_TENSOR_VALUE = 1e6
"""Latents and embeddings have about unit size; a larger value is a mistake that would end in NaN."""


def check_word(field: str, text: object) -> str:
    """A word as it may stand in a prompt.

    Raises:
        RequestError: it is empty, too long, or has control characters or blanks around it.
    """
    fine = isinstance(text, str) and 0 < len(text) <= MAX_WORD_LENGTH and text.isprintable() and text == text.strip()
    if not fine:
        raise refused(field, text, f"a word of 1 to {MAX_WORD_LENGTH} printable characters, without blanks around it")
    return str(text)


def optional(check: Any, name: str, value: Any) -> Any:
    """``check(name, value)``, or None for None."""
    return None if value is None else check(name, value)


def check_integer(name: str, value: Any, least: int, most: int) -> int:
    """An integer within bounds.

    Raises:
        RequestError: no integer, or outside.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or not least <= value <= most:
        upper = "2**64 - 1" if most == MAX_SEED else most
        raise refused(name, value, f"an integer from {least} to {upper}")
    return int(value)


def check_pixels(name: str, size: Any) -> int:
    """A picture's height or width.

    Raises:
        RequestError: no integer, or outside 64..4096.
    """
    return check_integer(name, size, MIN_PIXELS, MAX_PIXELS)


def check_pictures(name: str, count: Any) -> int:
    """A number of pictures.

    Raises:
        RequestError: no integer, or outside 1..1024.
    """
    return check_integer(name, count, 1, MAX_PICTURES)


def check_seeds(name: str, seeds: Any) -> tuple[int, ...]:
    """One seed or several.

    Raises:
        RequestError: none, or one that is no integer or out of range.
    """
    several = [seeds] if isinstance(seeds, int | np.integer) and not isinstance(seeds, bool) else seeds
    if not isinstance(several, list | tuple) or not several or len(several) > MAX_PICTURES:
        raise refused(name, seeds, f"an integer from 0 to 2**64 - 1, or a list of 1 to {MAX_PICTURES} of them")
    return tuple(check_integer(name, seed, 0, MAX_SEED) for seed in several)


def check_number(name: str, value: Any, most: float, note: str = "") -> float:
    """A finite real number of at most ``most``, in absolute value.

    Raises:
        RequestError: anything else.
    """
    accepted = f"a finite number from -{most:g} to {most:g}{note}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise refused(name, value, accepted)
    if not -most <= value <= most:  # also NaN, and integers that no float holds
        raise refused(name, value, accepted)
    return float(value)


def check_scale(name: str, scale: Any) -> float:
    """A guidance scale.

    Raises:
        RequestError: no finite number, or beyond 1000.
    """
    return check_number(name, scale, MAX_GUIDANCE, " (up to 1 means no guidance)")


def check_share(name: str, value: Any) -> float:
    """A number from 0 to 1.

    Raises:
        RequestError: anything else.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise refused(name, value, "a number from 0 to 1")
    if not 0 <= value <= 1:
        raise refused(name, value, "a number from 0 to 1")
    return float(value)


def check_choice(name: str, value: Any, accepted: Sequence[str]) -> str:
    """One of several words.

    Raises:
        RequestError: another word.
    """
    if not isinstance(value, str) or value not in accepted:
        words = ", ".join(accepted)
        raise RequestError(
            f"{name} {shown(value)} is not known; accepted: {words}", field=name, value=value, accepted=words
        )
    return value


def check_bool(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        RequestError: anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise refused(name, value, "True or False")
    return bool(value)


def as_prompts(name: str, prompt: Any) -> tuple[str, ...]:
    """One prompt or several.

    Raises:
        RequestError: neither a string nor a non-empty list of strings, or text that is not Unicode, or too long.
    """
    if isinstance(prompt, str):
        prompt = (prompt,)
    if not isinstance(prompt, list | tuple) or not 1 <= len(prompt) <= MAX_PICTURES:
        raise refused(name, prompt, f"a string or a list of 1 to {MAX_PICTURES} strings")
    for text in prompt:
        if not isinstance(text, str):
            raise RequestError(
                f"{name} has an entry of type {type(text).__name__} ({shown(text)}); every entry must be a string",
                field=name,
                value=text,
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            quoted = shortened(plain(text))
            raise RequestError(f"{name} '{quoted}' is no Unicode text (it has bytes that are not UTF-8)", field=name)
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise RequestError(
                f"{name} {shown(text)} has {len(text)} characters; up to {MAX_PROMPT_CHARACTERS} are accepted",
                field=name,
            )
    return tuple(prompt)


def as_array(name: str, value: Any, shape: tuple[int | None, ...]) -> Array:
    """A caller's tensor as C-contiguous float32 of exactly ``shape`` (None: any size).

    Raises:
        RequestError: another shape, no real numbers, or one that is NaN, infinite or beyond 1e6.
    """
    try:
        found = np.asarray(value)
    except Exception as error:  # a caller's own class may raise anything; torch raises TypeError and RuntimeError
        kind = type(value).__name__
        raise RequestError(
            f"{name} of type {kind} is no array of numbers: {shortened(plain(str(error)))}", field=name
        ) from None
    if found.dtype.kind not in "fiu":
        raise RequestError(
            f"{name} of type {type(value).__name__} holds {plain(str(found.dtype))}; it must hold real numbers",
            field=name,
        )
    fits = found.ndim == len(shape) and all(s is None or s == a for s, a in zip(shape, found.shape, strict=True))
    if not fits or 0 in found.shape:
        wanted = tuple("any" if s is None else s for s in shape)
        raise RequestError(f"{name} has shape {found.shape}; it must be {wanted}", field=name, value=found.shape)
    if not np.isfinite(found).all():
        raise RequestError(f"{name} holds NaN or infinity", field=name)
    if (largest := float(np.abs(found.astype(np.float64)).max())) > MAX_TENSOR_VALUE:
        raise RequestError(f"{name} holds {largest:g}; values up to {MAX_TENSOR_VALUE:g} are accepted", field=name)
    return np.ascontiguousarray(found, dtype=np.float32)


def check_absent(name: str, value: Any, why: str) -> None:
    """Refuse an argument that exists only so that positional arguments stand where diffusers has them.

    Raises:
        RequestError: it was given.
    """
    if value is not None:
        raise RequestError(f"{name} {shown(value)} is not accepted; {why}", field=name, value=value, accepted="None")


def given_or(value: Any, default: Any) -> Any:
    """``value`` unless it is None; 0 is a value."""
    return default if value is None else value
