"""Pictures that a request brings along: opened, turned upright, and made into what the encoders take."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import RequestError, plain, refused, shortened
from .files import MIB, name_of, read_bounded

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PICTURE_BYTES = 64 * MIB
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_IMAGES = 8
MAX_WEIGHT = 10
_DATA = "data:"


def open_picture(field: str, source: Any) -> Image.Image:
    """A picture, upright, RGB.

    Rotation that a camera noted (EXIF) is applied; transparent pixels become white.

    Args:
        field: what the request calls it, for messages.
        source: a PIL image, the path of a file, or a ``data:image/...;base64,`` URI.

    Raises:
        RequestError: it is none of these, cannot be read, or has more pixels than Pillow's limit.
    """
    from PIL import ImageOps  # with all of EXIF's names, which most requests do without

    picture = _opened(field, source)
    try:
        upright = _of_8_bits(ImageOps.exif_transpose(picture))
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            seen = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
        return upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise RequestError(f"{field} cannot be read: {shortened(plain(str(error)))}", field=field) from None


def open_mask(field: str, source: Any) -> Mask:
    """A mask, ``[H, W]`` bool: True where something new is drawn.

    Args:
        field: what the request calls it, for messages.
        source: as in `open_picture`; white is drawn anew, black is kept. In a picture with transparency the
            transparent pixels are drawn anew instead, as in OpenAI's API.

    Raises:
        RequestError: it is no picture.
    """
    from PIL import ImageOps  # with all of EXIF's names, which most requests do without

    picture = _opened(field, source)
    try:
        upright = _of_8_bits(ImageOps.exif_transpose(picture))
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            return np.asarray(upright.convert("RGBA"))[..., 3] < 128
        return np.asarray(upright.convert("L")) >= 128
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise RequestError(f"{field} cannot be read: {shortened(plain(str(error)))}", field=field) from None


def _of_8_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits in its upper 8 bits; Pillow would make everything above 255 white."""
    if picture.mode != "I;16":
        return picture
    values = np.asarray(picture)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" not in picture.info:
        return grey
    alpha = np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _opened(field: str, source: Any) -> Image.Image:
    """A PIL image whose size is known to be bearable; its pixels are not read yet."""
    if isinstance(source, Image.Image):
        picture = source
    elif isinstance(source, str | Path):
        data = _data_of(field, source)
        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = shortened(plain(str(error)).replace(hex(id(data)), "the file"))
            raise RequestError(
                f"{field} {_named(source)} is no picture that can be read ({reason}); accepted: {', '.join(FORMATS)}",
                field=field,
            ) from None
    else:
        raise refused(field, source, "a PIL image, or the path of a picture")
    width, height = picture.size
    most = Image.MAX_IMAGE_PIXELS or 2**28
    if width * height > most:
        raise RequestError(
            f"{field} has {width} x {height} pixels; up to {most} pixels are accepted", field=field, value=picture.size
        )
    return picture


def _named(source: str | Path) -> str:
    text = str(source)
    return "given as data" if text.startswith(_DATA) else name_of(text)


def _data_of(field: str, source: str | Path) -> bytes:
    text = str(source)
    if text.startswith(_DATA):
        head, comma, body = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError(f"{field} is no data URI of the form data:image/png;base64,...", field=field)
        if len(body) > 2 * MAX_PICTURE_BYTES:
            raise RequestError(f"{field} has {len(body)} characters of base64; that is too many", field=field)
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(f"{field} holds base64 that cannot be decoded", field=field) from None
    try:
        return read_bounded(Path(text).expanduser(), MAX_PICTURE_BYTES, RequestError)
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{field}: there is no file {name_of(text)}", field=field) from None
    except RuntimeError as error:  # ~unknown
        raise RequestError(f"{field} {name_of(text)}: {plain(str(error))}", field=field) from None


def pictures_to_vary(images: Any) -> tuple[tuple[Image.Image, float], ...]:
    """The ``images`` argument of a call: pictures, each with its weight.

    Args:
        images: None, one picture, or a list; each as `open_picture` takes it, or ``(picture, weight)``.

    Raises:
        RequestError: something else, or a weight that is no finite number.
    """
    if images is None:
        return ()
    made = []
    for index, one in enumerate(images if isinstance(images, list) else [images]):
        field = f"images[{index}]"
        source, weight = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0)
        number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
        if not number or not abs(weight) <= MAX_WEIGHT:
            raise refused(f"{field}.weight", weight, f"a finite number from -{MAX_WEIGHT} to {MAX_WEIGHT}")
        made.append((open_picture(field, source), float(weight)))
    if not 1 <= len(made) <= MAX_IMAGES:
        raise refused("images", images, f"a picture, or a list of 1 to {MAX_IMAGES}")
    return tuple(made)


def clip_pixels(picture: Image.Image, side: int) -> Array:
    """A picture as CLIP's image encoder takes it.

    The short side is resized to ``side`` (bicubic, antialiased), the middle is cut out, and the values are normalised.

    Args:
        picture: from `open_picture`.
        side: of the encoder's input.

    Returns:
        ``[3, side, side]`` float32. Matches: transformers' ``CLIPImageProcessor``.
    """
    short = min(picture.size)
    width, height = (side if length == short else int(side * length / short) for length in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    values = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.float32) / np.float32(255)
    mean, std = (np.array(row, dtype=np.float32) for row in (CLIP_MEAN, CLIP_STD))
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))


def encoder_pixels(picture: Image.Image, height: int, width: int) -> Array:
    """A picture as the semantic encoder and Stage A's encoder take it.

    It is cut to the aspect of ``height`` x ``width`` around its middle, and resized (bilinear, antialiased) in float32.

    Returns:
        ``[1, 3, height, width]`` float32 in 0..1. Matches: torchvision's ``resize(antialias=True)`` on tensors.
    """
    cut = picture.crop(middle(picture.size, width / height))
    channels = [
        np.asarray(_as_float(channel).resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
        for channel in cut.split()
    ]
    return np.ascontiguousarray(np.stack(channels)[None] / np.float32(255)).clip(0, 1)


def middle(size: tuple[int, int], aspect: float) -> tuple[int, int, int, int]:
    """The largest box (left, top, right, bottom) of an aspect (width over height) around the middle of a picture."""
    width, height = size
    wide, high = (min(width, round(height * aspect)), min(height, round(width / aspect)))
    if abs(width / height - aspect) * min(size) <= 1:  # within a pixel: nothing is cut
        wide, high = width, height
    left, top = (width - max(1, wide)) // 2, (height - max(1, high)) // 2
    return left, top, left + max(1, wide), top + max(1, high)


def mask_on_grid(mask: Mask, height: int, width: int) -> Array:
    """A mask on a coarser grid: ``[1, 1, height, width]`` float32, 1 for every cell that has a True pixel in it."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    picture = picture.crop(middle(picture.size, width / height))
    share = np.asarray(_as_float(picture).resize((width, height), Image.Resampling.BOX), dtype=np.float32)
    return (share > 0.5).astype(np.float32)[None, None]


def _as_float(channel: Image.Image) -> Image.Image:
    return channel.convert("F")
