"""Control pictures: what each kind of ControlNet is shown of a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import RequestError
from .image import resize_bilinear
from .pictures import Mask, encoder_pixels, middle

Array = NDArray[np.float32]

CANNY_SIDE = 224
CANNY_THRESHOLDS = (100, 200)


def control_pixels(
    kind: str, picture: Image.Image, mask: Mask | None, size: tuple[int, int], channels: int, filtered: bool
) -> Array:
    """What a ControlNet sees of a picture.

    Args:
        kind: ``canny``: its edges; ``inpainting``: the picture, white under the mask, and the mask; ``picture``: the
            picture itself. Super-resolution sees latents, which an encoder makes.
        picture: from `open_picture`; cut to the aspect of ``size`` around its middle.
        mask: of ``inpainting``: True where something new is drawn.
        size: (height, width) of the result.
        channels: of the ControlNet's input; 1 takes a ``picture``'s brightness.
        filtered: the picture shows already what ``canny`` would find.

    Returns:
        ``[1, channels, height, width]`` float32 in 0..1.

    Raises:
        RequestError: the filter is not installed.
    """
    pixels = encoder_pixels(picture, *size)
    if kind == "canny" and not filtered:
        return canny_edges(pixels)
    if kind == "inpainting":
        assert mask is not None  # a plan refuses this kind without a mask
        hidden = _mask_pixels(mask, size)
        return np.concatenate([np.where(hidden > 0, np.float32(1), pixels), hidden], axis=1)
    if channels == 1:
        return encoder_pixels(picture.convert("L").convert("RGB"), *size)[:, :1].copy()
    return pixels


def canny_edges(pixels: Array) -> Array:
    """The edges of a picture, found at 224 x 224 whatever its size, and resized back.

    OpenCV finds the edges, in whole numbers. Resizing is `resize_bilinear`'s, so that the result does not depend on
    OpenCV's version, and is that of the C++ kit.

    Args:
        pixels: ``[1, 3, H, W]`` float32 in 0..1.

    Returns:
        ``[1, 1, H, W]`` float32 in 0..1.
        Matches: ``CannyFilter`` of ``StableCascade/modules/cnet_modules/canny.py``.

    Raises:
        RequestError: OpenCV is not installed.
    """
    cv2 = _opencv()
    small = resize_bilinear(pixels, CANNY_SIDE, CANNY_SIDE, corners=False)[0].transpose(1, 2, 0)
    edges = cv2.Canny(np.ascontiguousarray((small * np.float32(255)).astype(np.uint8)), *CANNY_THRESHOLDS)
    found = (edges > 0).astype(np.float32)[None, None]
    return resize_bilinear(found, *pixels.shape[2:], corners=False)


def enlarged(latents: Array) -> Array:
    """Latents ``[B, C, h, w]`` at twice their size, each repeated: what super-resolution is told."""
    doubled: Array = latents.repeat(2, axis=2).repeat(2, axis=3)
    return doubled


def on_grid(residuals: Array, height: int, width: int) -> Array:
    """Residuals ``[B, n, h, w, C]`` on Stage C's grid: bilinear, corners aligned, as in the authors' network."""
    count, channels = residuals.shape[1], residuals.shape[4]
    if residuals.shape[2:4] == (height, width):
        return residuals
    planes = residuals.transpose(0, 1, 4, 2, 3).reshape(len(residuals), count * channels, *residuals.shape[2:4])
    resized = resize_bilinear(planes, height, width).reshape(len(residuals), count, channels, height, width)
    return np.ascontiguousarray(resized.transpose(0, 1, 3, 4, 2))


def _mask_pixels(mask: Mask, size: tuple[int, int]) -> Array:
    """A mask as ``[1, 1, H, W]`` float32, 1 where something new is drawn; cut as the picture is."""
    height, width = size
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    cut = picture.crop(middle(picture.size, width / height)).resize((width, height), Image.Resampling.NEAREST)
    return (np.asarray(cut) > 0).astype(np.float32)[None, None]


def _opencv() -> Any:
    try:
        import cv2
    except ImportError:
        raise RequestError(
            "the canny filter needs OpenCV; install it with: pip install 'cascade-rt[control]', or give the edges "
            "themselves as control_image, with control_filtered",
            field="control_image",
        ) from None
    return cv2
