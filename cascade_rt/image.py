"""Pixels <-> arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from .errors import OutputError

Array = NDArray[np.float32]


def resize_bilinear(x: Array, height: int, width: int) -> Array:
    """Bilinear resize with aligned corners, in float32.

    Stage B sees Stage C's latents resized to its own grid; done here it costs a millisecond, and no engine needs a
    Resize operator, which several lack in bfloat16.

    Args:
        x: ``[B, C, h, w]`` float32.
        height: target height.
        width: target width.

    Returns:
        ``[B, C, height, width]`` float32. Matches: ``torch.nn.functional.interpolate(align_corners=True)``.
    """
    rows, columns = _corner_weights(x.shape[2], height), _corner_weights(x.shape[3], width)
    resized: Array = rows @ (x @ columns.T)
    return resized


def _corner_weights(source: int, target: int) -> Array:
    """``[target, source]`` matrix of linear interpolation weights, corners aligned."""
    position = np.linspace(0, source - 1, target) if target > 1 else np.zeros(1)
    low = np.minimum(position.astype(np.int64), max(source - 2, 0))
    weights = np.zeros((target, source))
    index = np.arange(target)
    weights[index, low] = 1 - (position - low)
    weights[index, np.minimum(low + 1, source - 1)] += position - low
    return weights.astype(np.float32)


def crop_center(pixels: Array, height: int, width: int) -> Array:
    """The middle ``height`` x ``width`` of ``[B, H, W, 3]``."""
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def to_pil(pixels: Array) -> list[Image.Image]:
    """``[B, H, W, 3]`` float32 in 0..1 -> pictures. Matches: diffusers' ``numpy_to_pil``."""
    return [Image.fromarray(p) for p in (pixels * 255).round().astype(np.uint8)]


def save_png(image: Image.Image, path: Path, facts: dict[str, str]) -> None:
    """Write a PNG that carries ``facts`` as text chunks; nothing half-written stays behind.

    Raises:
        OutputError: the folder is missing or not writable, or there is no room.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    partial = path.with_name(f".{path.name}.partial")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"the picture cannot be written to {path}: {error.strerror or error}") from error
    finally:
        if partial.is_file():
            partial.unlink()
