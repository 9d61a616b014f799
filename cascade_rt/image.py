"""Pixels <-> arrays."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from .errors import RequestError, plain, shortened
from .files import MIB, name_of, read_bounded

Array = NDArray[np.float32]
MAX_PICTURE_BYTES = 256 * MIB


def resize_bilinear(x: Array, height: int, width: int, *, corners: bool = True) -> Array:
    """Bilinear resize in float32.

    Stage B sees Stage C's latents resized to its own grid; done here it costs a millisecond, and no engine needs a
    Resize operator, which several lack in bfloat16. OpenCV's resizing gives other last bits with another version.

    Every number is ``x[low] * (1 - share) + x[high] * share``, two rounded products and their rounded sum, first along
    the width, then along the height: the C++ kit does the same, so that both give the same bits. A product of matrices
    would leave the order to the BLAS library.

    Args:
        x: ``[B, C, h, w]`` float32.
        height: target height.
        width: target width.
        corners: the middles of the corners stay where they are; else the edges do.

    Returns:
        ``[B, C, height, width]`` float32, C-contiguous.
        Matches: ``torch.nn.functional.interpolate(align_corners=corners)``.
    """
    low, high, share = _neighbours(x.shape[3], width, corners)
    wide: Array = x[..., low] * (np.float32(1) - share) + x[..., high] * share
    low, high, share = _neighbours(x.shape[2], height, corners)
    resized: Array = wide[:, :, low] * (np.float32(1) - share)[:, None] + wide[:, :, high] * share[:, None]
    return np.ascontiguousarray(resized)


def _neighbours(source: int, target: int, corners: bool) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """For each of ``target`` positions: the index below, the index above, the share of the latter."""
    position = np.arange(target) * ((source - 1) / max(target - 1, 1))
    if not corners:
        position = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    low = np.minimum(position.astype(np.int64), max(source - 2, 0))
    return low, np.minimum(low + 1, source - 1), (position - low).astype(np.float32)


def colours_of(latents: Array, factors: Array, offset: Array) -> Array:
    """Latents as colours, ``[B, h, w, 3]`` float32 in 0..1: one matrix, no network.

    Args:
        latents: ``[B, C, h, w]`` float32.
        factors: ``[C, 3]`` float32.
        offset: ``[3]`` float32.
    """
    summed = latents.transpose(0, 2, 3, 1).astype(np.float64) @ factors.astype(np.float64)  # rounded once, as in C++
    colours: Array = np.clip(summed.astype(np.float32) + offset, 0, 1)
    return colours


def crop_center(pixels: Array, height: int, width: int) -> Array:
    """The middle ``height`` x ``width`` of ``[B, H, W, 3]``."""
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def to_pil(pixels: Array) -> list[Image.Image]:
    """``[B, H, W, 3]`` float32 in 0..1 -> pictures. Matches: diffusers' ``numpy_to_pil``."""
    return [Image.fromarray(p) for p in (pixels * 255).round().astype(np.uint8)]


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Ending of a file's name -> the format that is written."""
REQUEST_KEY = "cascade_rt.request"
_EXIF_DESCRIPTION = 0x010E
_QUALITY = 95


def encode_picture(
    image: Image.Image,
    ending: str,
    request: str | None,
    facts: Mapping[str, str],
    *,
    quality: int = _QUALITY,
    compress_level: int = 6,
) -> bytes:
    """The bytes of a picture file that carries the request that made it.

    Args:
        image: RGB.
        ending: a key of `FORMATS`.
        request: `Request.to_json`; a PNG has it as a text chunk, the others as EXIF's ImageDescription. None: left out.
        facts: other text chunks, PNG only.
        quality: of JPEG and WebP, 0..100.
        compress_level: of PNG, 0..9: more takes longer and gives smaller files.
    """
    made = io.BytesIO()
    kind = FORMATS[ending]
    own = {} if request is None else {REQUEST_KEY: request}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        for key, value in {**own, **facts}.items():
            info.add_itxt(key, value)
        image.save(made, format=kind, pnginfo=info, compress_level=compress_level)
    else:
        exif = Image.Exif()
        if request is not None:
            exif[_EXIF_DESCRIPTION] = json.dumps({REQUEST_KEY: json.loads(request)})  # ASCII, as EXIF wants it
        image.save(made, format=kind, exif=exif, quality=quality)
    return made.getvalue()


def read_request(path: Path) -> str:
    """The request that a picture of ours carries, as JSON text.

    Raises:
        RequestError: it is no readable picture, or carries none.
    """
    try:
        data = read_bounded(path, MAX_PICTURE_BYTES, RequestError)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            text = picture.info.get(REQUEST_KEY)
            if text is None:
                text = _described(picture.getexif().get(_EXIF_DESCRIPTION))
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"there is no picture {name_of(path)}", field="from") from None
    except RequestError:
        raise
    except (OSError, ValueError, TypeError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise RequestError(f"{name_of(path)} cannot be read as a picture: {shortened(plain(str(error)))}") from None
    if not isinstance(text, str):
        raise RequestError(f"{name_of(path)} carries no request of cascade-rt; name a picture that cascade-run made")
    return str(text)  # Pillow's own kind of string, which a JSON reader does not take


def _described(description: Any) -> str | None:
    """The request in EXIF's ImageDescription, which may hold anything; None where there is none."""
    try:
        found = json.loads(description)
    except (ValueError, TypeError, RecursionError):
        return None
    return json.dumps(found[REQUEST_KEY]) if isinstance(found, dict) and REQUEST_KEY in found else None
