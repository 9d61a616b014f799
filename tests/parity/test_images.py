"""Pictures as CLIP's image encoder and the semantic encoder are given them: against transformers and torch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

from cascade_rt import RequestError
from cascade_rt.image import resize_bilinear, to_pil
from cascade_rt.pictures import clip_pixels, encoder_pixels, open_picture

SIZES = [(224, 224), (300, 200), (200, 300), (641, 480), (37, 91), (1000, 30), (224, 225), (223, 400), (8, 8)]
"""Width and height."""


def processor(side: int) -> Any:
    """CLIP's own; the variant over PIL, which the checkpoint's numbers were made with."""
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Noise, which shows every difference between two resamplings."""
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    made = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return made.convert(mode)


@pytest.mark.parametrize("side", [224, 32])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_clip_pixels_are_transformers(size: tuple[int, int], side: int) -> None:
    picture = noise(size)
    made = clip_pixels(open_picture("images[0]", picture), side)
    wanted = processor(side)(picture, return_tensors="np")["pixel_values"][0]
    assert made.dtype == np.float32
    assert made.shape == wanted.shape == (3, side, side)
    assert made.flags.c_contiguous
    np.testing.assert_allclose(made, wanted, atol=2e-6)
    if min(size) > 40:  # the comparison can fail: one pixel further, or another filter
        shifted = clip_pixels(open_picture("images[0]", picture.crop((1, 1, *size))), side)
        assert np.abs(shifted - wanted).max() > 0.02


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16", "F", "YCbCr"])
def test_pictures_of_every_mode_are_read_as_colours(mode: str) -> None:
    if mode in ("I;16", "F"):
        values = np.arange(64 * 64).reshape(64, 64) * 4
        picture = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.float32))
        assert picture.mode == mode
    else:
        picture = noise((64, 64), mode)
    made = clip_pixels(open_picture("images[0]", picture), 32)
    assert np.isfinite(made).all()
    assert made.std() > 0.05
    if mode not in ("I;16", "F"):
        np.testing.assert_allclose(
            made, processor(32)(picture.convert("RGB"), return_tensors="np")["pixel_values"][0], atol=2e-6
        )


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    white = Image.new("RGB", (64, 64), "white")
    np.testing.assert_array_equal(
        clip_pixels(open_picture("images[0]", clear), 32), clip_pixels(open_picture("images[0]", white), 32)
    )


def test_a_cameras_rotation_is_undone() -> None:
    picture = noise((64, 48))
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.info["exif"] = exif.tobytes()
    turned._exif = None  # type: ignore[attr-defined]
    np.testing.assert_array_equal(
        clip_pixels(open_picture("images[0]", turned), 32), clip_pixels(open_picture("images[0]", picture), 32)
    )


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (512, 512), (100, 90)], ids=str)
@pytest.mark.parametrize("target", [(192, 192), (192, 288), (64, 32)], ids=str)
def test_encoder_pixels_are_torchs(size: tuple[int, int], target: tuple[int, int]) -> None:
    """Cut to the target's aspect around the middle, then resized with torch's antialiased bilinear filter."""
    height, width = target
    picture = noise(size)
    made = encoder_pixels(open_picture("init_image", picture), height, width)
    assert made.shape == (1, 3, height, width)
    assert made.dtype == np.float32
    wide = size[0] * height > size[1] * width
    cut_width, cut_height = (
        (round(size[1] * width / height), size[1]) if wide else (size[0], round(size[0] * height / width))
    )
    left, top = (size[0] - cut_width) // 2, (size[1] - cut_height) // 2
    cut = np.asarray(picture.crop((left, top, left + cut_width, top + cut_height)), dtype=np.float32) / 255
    tensor = torch.from_numpy(cut.transpose(2, 0, 1))[None]
    wanted = torch.nn.functional.interpolate(
        tensor, size=target, mode="bilinear", align_corners=False, antialias=True
    ).numpy()
    np.testing.assert_allclose(made, wanted, atol=3e-3)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize(
    "sizes", [(2, 3, 5, 7), (6, 6, 32, 32), (24, 24, 128, 128), (3, 5, 2, 3), (1, 1, 4, 4), (4, 4, 1, 1)]
)
def test_resize_is_torchs(sizes: tuple[int, int, int, int], corners: bool) -> None:
    height, width, rows, columns = sizes
    x = np.random.default_rng(0).standard_normal((2, 16, height, width)).astype(np.float32)
    wanted, other = (
        torch.nn.functional.interpolate(
            torch.from_numpy(x), size=(rows, columns), mode="bilinear", align_corners=aligned
        ).numpy()
        for aligned in (corners, not corners)
    )
    made = resize_bilinear(x, rows, columns, corners=corners)
    np.testing.assert_allclose(made, wanted, atol=1e-5)
    if rows > 1 and height > 1:
        assert np.abs(made - other).max() > 1e-3 or (rows, columns) == (height, width)


def test_to_pil_is_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    pixels = np.random.default_rng(0).random((2, 8, 9, 3), dtype=np.float32)
    for made, wanted in zip(to_pil(pixels), VaeImageProcessor.numpy_to_pil(pixels), strict=True):
        np.testing.assert_array_equal(np.asarray(made), np.asarray(wanted))


@pytest.mark.parametrize("value", [None, 3, b"data", torch.zeros(3, 8, 8), np.zeros((8, 8, 3)), ["x.png"], object()])
def test_what_is_no_picture_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match=r"images\[0\]") as found:
        open_picture("images[0]", value)
    assert found.value.field == "images[0]"
