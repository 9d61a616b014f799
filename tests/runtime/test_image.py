"""Pixels and arrays, and what a picture file says of itself."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade_rt import Request, RequestError
from cascade_rt.image import FORMATS, crop_center, encode_picture, read_request, resize_bilinear, to_pil

# torch.nn.functional.interpolate(torch.arange(6.).reshape(1, 1, 2, 3), (3, 4), mode="bilinear", align_corners=True)
TORCHS = [[0, 0.6667, 1.3333, 2], [1.5, 2.1667, 2.8333, 3.5], [3, 3.6667, 4.3333, 5]]


def test_resize_is_torchs_with_aligned_corners() -> None:
    made = resize_bilinear(np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3), 3, 4)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made[0, 0], TORCHS, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 20), st.integers(1, 20))
def test_resize_keeps_planes(height: int, width: int, rows: int, columns: int) -> None:
    """A plane stays a plane, its corners stay, and the middle of one row is its first value, as in torch."""
    y, x = np.linspace(-1, 1, height), np.linspace(2, 5, width)
    plane = (2 * y[:, None] + 3 * x[None]).astype(np.float32)[None, None].repeat(2, axis=1)
    made = resize_bilinear(plane, rows, columns)
    assert made.shape == (1, 2, rows, columns)
    wanted_y = np.linspace(-1, 1, rows) if height > 1 and rows > 1 else np.full(rows, y[0])
    wanted_x = np.linspace(2, 5, columns) if width > 1 and columns > 1 else np.full(columns, x[0])
    np.testing.assert_allclose(made[0, 1], 2 * wanted_y[:, None] + 3 * wanted_x[None], atol=1e-4)


def test_the_same_size_is_the_same_array() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 6)).astype(np.float32)
    np.testing.assert_array_equal(resize_bilinear(x, 5, 6), x)


def test_crop_is_central() -> None:
    pixels = np.arange(6 * 8).reshape(1, 6, 8, 1).repeat(3, axis=3).astype(np.float32)
    np.testing.assert_array_equal(crop_center(pixels, 4, 4)[0, :, :, 0], pixels[0, 1:5, 2:6, 0])


def test_to_pil_rounds() -> None:
    (image,) = to_pil(np.array([0.0, 0.5, 1.0], dtype=np.float32).reshape(1, 1, 1, 3))
    assert image.getpixel((0, 0)) == (0, 128, 255)


REQUEST = Request(prompt='a "red" circle\n🔴 \\ é', seeds=(2**64 - 1,), prior={"guidance_scale": 2.5})  # type: ignore[arg-type]


def noise_picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))


@pytest.mark.parametrize("ending", FORMATS)
def test_a_picture_carries_its_request(tmp_path: Path, ending: str) -> None:
    place = tmp_path / f"x{ending}"
    data = encode_picture(noise_picture(), ending, REQUEST.to_json(), {"seed": "3"})
    place.write_bytes(data)
    assert Request.from_json(read_request(place)) == REQUEST
    picture = Image.open(io.BytesIO(data))
    assert picture.format == FORMATS[ending]
    assert picture.size == (24, 16)
    if ending == ".png":
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(noise_picture()))
        assert picture.text["seed"] == "3"


def png_with(**texts: str) -> bytes:
    from PIL import PngImagePlugin

    info, made = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in texts.items():
        info.add_itxt(key.replace("__", "."), value)
    noise_picture().save(made, format="PNG", pnginfo=info)
    return made.getvalue()


def jpeg_with(description: str) -> bytes:
    exif, made = Image.Exif(), io.BytesIO()
    exif[0x010E] = description
    noise_picture().save(made, format="JPEG", exif=exif)
    return made.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as a picture"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as a picture"),
        (b"x" * 1000, "cannot be read as a picture"),
        (b"GIF89a" + bytes(100), "cannot be read as a picture"),
        (png_with()[:100], "carries no request|cannot be read as a picture"),
        (png_with(), "carries no request of cascade-rt; name a picture that cascade-run made"),
        (jpeg_with("my holiday"), "carries no request"),
        (jpeg_with("[]"), "carries no request"),
        (jpeg_with("3"), "carries no request"),
        (jpeg_with("null"), "carries no request"),
        (jpeg_with("{}"), "carries no request"),
        (jpeg_with("[" * 30_000), "carries no request"),
    ],
)
def test_other_pictures_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    place = tmp_path / "x\x1b.png"
    place.write_bytes(data)
    with pytest.raises(RequestError, match=message) as found:
        read_request(place)
    assert str(found.value).isprintable()


@pytest.mark.parametrize("request_", ["", "{", "[]", "3", '{"height": 3}', '{"promt": "x"}', "\x00"])
def test_a_request_that_was_tampered_with_is_refused_like_any_other(tmp_path: Path, request_: str) -> None:
    place = tmp_path / "x.png"
    place.write_bytes(png_with(cascade_rt__request=request_))
    with pytest.raises(RequestError):
        Request.from_json(read_request(place))
    if request_.startswith(("{", "[", "3")) and request_ != "{":
        other = tmp_path / "x.jpg"
        other.write_bytes(jpeg_with(json.dumps({"cascade_rt.request": json.loads(request_)})))
        with pytest.raises(RequestError):
            Request.from_json(read_request(other))


def test_a_picture_too_large_to_open_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    place = tmp_path / "x.png"
    place.write_bytes(encode_picture(noise_picture(), ".png", REQUEST.to_json(), {}))
    with pytest.raises(RequestError, match="cannot be read as a picture"):
        read_request(place)
