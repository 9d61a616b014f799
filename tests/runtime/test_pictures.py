"""Pictures that a request brings along: opened with care, encoded, begun from, kept outside a mask."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cascade_rt import CascadePipeline, Request, RequestError
from cascade_rt.entry import main_run
from cascade_rt.pictures import encoder_pixels, mask_on_grid, middle, open_mask, open_picture
from cascade_rt.sampling import cosine_alpha_bar, diffuse, make_schedule

RED, BLUE = np.array([220, 30, 40]), np.array([36, 82, 224])


@pytest.fixture(scope="module")
def pipe(shipped: Path) -> Iterator[CascadePipeline]:
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as made:
        yield made


def scene(width: int = 256, height: int = 256) -> Image.Image:
    """A red circle at the left on blue."""
    picture = Image.new("RGB", (width, height), tuple(BLUE))
    ImageDraw.Draw(picture).ellipse((20, 80, 120, 180), fill=tuple(RED))
    return picture


def mean_colour(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray[Any, Any]:
    return np.asarray(image.crop(box), dtype=np.float64).reshape(-1, 3).mean(axis=0)


def psnr(made: Any, wanted: Any) -> float:
    a, b = (np.asarray(x, dtype=np.float64) / 255 for x in (made, wanted))
    return float(-10 * np.log10(np.mean((a - b) ** 2)))


def test_the_authors_schedule_from_a_picture() -> None:
    """Figures of the authors' code at noise level 0.8: signal 0.0940 when noised, 0.0253 where the loop begins."""
    schedule = make_schedule("original", 16, shift=2.0, start=0.8)
    assert cosine_alpha_bar(0.8) == pytest.approx(0.0940, abs=5e-5)
    assert schedule.alpha_bar[0] == pytest.approx(0.0253, abs=5e-5)
    assert schedule.ratios[0] == pytest.approx(0.8975, abs=5e-5)
    noised = diffuse(np.full((1, 1, 2, 2), 2, np.float32), np.full((1, 1, 2, 2), 3, np.float32), 0.36)
    np.testing.assert_allclose(noised, 0.6 * 2 + 0.8 * 3, rtol=1e-6)


def test_reconstruction(pipe: CascadePipeline) -> None:
    latents = pipe.encode(scene())
    assert latents.shape == (1, 16, 6, 6)
    assert latents.dtype == np.float32
    again = pipe.decode(latents, seed=0)
    assert psnr(again, scene()) > 24
    assert psnr(pipe.decode(-latents, seed=0), scene()) < 15  # the comparison can fail
    np.testing.assert_array_equal(np.asarray(pipe.decode(latents[0], seed=0)), np.asarray(again))


def test_strength_0_is_the_reconstruction(pipe: CascadePipeline) -> None:
    whole = pipe("", init_image=scene(), strength=0, seed=0, output_type="np").images
    assert psnr(whole[0] * 255, scene()) > 24


def test_strength_1_is_the_text_picture(pipe: CascadePipeline) -> None:
    """At time 1 a hundredth of the latents is left, as in the authors' code."""
    text = "a large green star at the right on a yellow background"
    plain = pipe(text, seed=0, output_type="np").images
    begun = pipe(text, seed=0, init_image=scene(), strength=1, output_type="np").images
    assert psnr(begun * 255, plain * 255) > 20
    assert not np.array_equal(begun, plain)


def test_a_picture_keeps_its_place_and_takes_the_prompt(pipe: CascadePipeline) -> None:
    made = pipe("a large green circle at the left on a blue background", init_image=scene(), strength=0.9, seed=1)
    red, green, blue = mean_colour(made.images[0], (50, 110, 90, 150))
    assert green > red
    assert green > blue


def test_inpainting_keeps_what_the_mask_keeps(pipe: CascadePipeline) -> None:
    mask = Image.new("L", (256, 256), 0)
    ImageDraw.Draw(mask).rectangle((128, 0, 255, 255), fill=255)
    text = "a large green square at the right on a blue background"
    made = pipe(text, init_image=scene(), mask_image=mask, seed=2).images[0]
    kept, drawn = (0, 0, 120, 256), (170, 100, 230, 160)
    own_error = psnr(pipe.decode(pipe.encode(scene()), seed=0).crop(kept), scene().crop(kept))
    assert psnr(made.crop(kept), scene().crop(kept)) > own_error  # Stage A's error alone: Stage B's latents are kept
    assert np.abs(mean_colour(made, drawn) - mean_colour(scene(), drawn)).max() > 40
    whole = pipe(text, init_image=scene(), mask_image=Image.new("L", (256, 256), 255), seed=2).images[0]
    assert psnr(whole.crop(kept), scene().crop(kept)) < own_error  # a mask that keeps nothing


def test_a_wide_picture_keeps_its_aspect(pipe: CascadePipeline) -> None:
    made = pipe("a red circle", init_image=scene(512, 256), strength=0.5, seed=0, prior_num_inference_steps=4)
    assert made.images[0].size == (512, 256)
    square = pipe("a red circle", init_image=scene(512, 256), height=128, width=128, strength=0.5, seed=0)
    assert square.images[0].size == (128, 128)


def test_random_numbers_come_in_the_authors_order(pipe: CascadePipeline) -> None:
    """Noise of the picture, Stage C's steps, Stage B's latents, Stage B's steps: one stream."""
    from cascade_rt.noise import TorchCPU

    first = TorchCPU(3).normal((1, 16, 6, 6))
    seeded = pipe.prior("x", seed=3, num_inference_steps=1)
    given = pipe.prior("x", latents=first, seed=9, num_inference_steps=1)
    np.testing.assert_array_equal(seeded.image_embeddings, given.image_embeddings)


def test_exif_rotation_and_transparency(tmp_path: Path) -> None:
    upright = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture("init_image", str(tmp_path / "turned.jpg")).size == (20, 40)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_picture("init_image", clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_mask("mask_image", clear).all()  # transparent is drawn anew, as in OpenAI's API
    assert not open_mask("mask_image", Image.new("L", (4, 4), 0)).any()


def test_a_data_uri_is_the_picture(tmp_path: Path) -> None:
    data = io.BytesIO()
    scene().save(data, format="PNG")
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    np.testing.assert_array_equal(np.asarray(open_picture("init_image", uri)), np.asarray(scene()))


def test_pixels_are_resized_in_float32() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    made = encoder_pixels(picture, 64, 96)
    assert made.shape == (1, 3, 64, 96)
    assert made.dtype == np.float32
    eight_bit = np.asarray(picture.resize((96, 64), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    assert 0 < np.abs(made[0].transpose(1, 2, 0) - eight_bit).max() <= 1.01 / 255  # it rounds twice
    assert middle((90, 60), 1.5) == (0, 0, 90, 60)
    assert middle((90, 60), 1.0) == (15, 0, 75, 60)


def test_a_cell_is_free_if_any_pixel_in_it_is() -> None:
    mask = np.zeros((64, 64), bool)
    mask[17, 33] = True
    grid = mask_on_grid(mask, 4, 4)
    assert grid.sum() == 1
    assert grid[0, 0, 1, 2] == 1


def bomb(folder: Path) -> str:
    """A PNG that says it has 2**31 pixels."""
    data = io.BytesIO()
    Image.new("1", (8, 8)).save(data, format="PNG")
    head = data.getvalue()
    size = (65535).to_bytes(4, "big") + (65535).to_bytes(4, "big")
    import zlib

    ihdr = b"IHDR" + size + head[24:29]
    (folder / "bomb.png").write_bytes(head[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + head[33:])
    return str(folder / "bomb.png")


def test_bad_pictures_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(_png()[:60])
    os.mkfifo(tmp_path / "pipe.png")
    for source, message in (
        (tmp_path / "missing.png", "there is no file"),
        (tmp_path / "text.png", "no picture that can be read"),
        (tmp_path / "cut.png", "cannot be read"),
        (tmp_path / "pipe.png", "no regular file"),
        (tmp_path, "no regular file"),
        (bomb(tmp_path), "pixels"),
        ("data:image/png;base64,####", "cannot be decoded"),
        ("data:image/png,abc", "no data URI"),
        ("~nobody-of-this-name/x.png", "nobody-of-this-name"),
        (3.5, "it must be a PIL image"),
    ):
        with pytest.raises(RequestError, match=message):
            open_picture("init_image", source)


def _png() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(data, format="PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 0.5}, "strength is given without init_image"),
        ({"mask_image": "m.png"}, "there is no file"),
        ({"init_image": "i.png", "strength": 1.5}, "strength 1.5 is not accepted"),
        ({"init_image": ""}, "init_image '' is not accepted"),
        ({"images": ({"image": "a.png", "weight": float("nan")},)}, "weight nan is not accepted"),
        ({"images": ({"picture": "a.png"},)}, "an object with image and weight"),
        ({"images": 9 * ({"image": "a.png"},)}, "a list of up to 8"),
    ],
)
def test_bad_requests(pipe: CascadePipeline, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe.run(Request(prompt="x", **fields))


def test_a_mask_of_another_size(pipe: CascadePipeline) -> None:
    with pytest.raises(RequestError, match=r"mask_image has 128 x 256 pixels, and init_image 256 x 256"):
        pipe("x", init_image=scene(), mask_image=Image.new("L", (128, 256), 255))


def test_a_request_with_pictures_survives_json() -> None:
    request = Request(prompt="x", images=({"image": "a.png"}, {"image": "b.png", "weight": 0.5}), init_image="c.png")  # type: ignore[arg-type]
    assert Request.from_json(request.to_json()) == request
    assert request.images[1].weight == 0.5


def test_the_command_makes_a_picture_again(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene().save(tmp_path / "scene.png")
    few = ["--steps", "2", "--decoder-steps", "1", "--quiet"]
    for ending in ("png", "webp", "jpg"):
        first, again = tmp_path / f"first.{ending}", tmp_path / f"again.{ending}"
        begin = ["a star", "--init", str(tmp_path / "scene.png"), "--strength", "0.7", "--seed", "4", *few]
        assert main_run([*begin, "-o", str(first)]) == 0
        assert main_run(["--from", str(first), "-o", str(again)]) == 0
        assert first.read_bytes() == again.read_bytes()
        other = tmp_path / f"other.{ending}"
        assert main_run(["--from", str(first), "--seed", "5", "-o", str(other)]) == 0
        assert first.read_bytes() != other.read_bytes()
    assert main_run(["--from", str(tmp_path / "scene.png"), "-o", str(tmp_path / "x.png")]) == 2
    assert "carries no request" in capsys.readouterr().err


def test_the_command_prints_the_error_of_a_reconstruction(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene().save(tmp_path / "scene.png")
    assert main_run(["--reconstruct", str(tmp_path / "scene.png"), "-o", str(tmp_path / "again.png")]) == 0
    printed = capsys.readouterr().out
    found = float(printed.partition("round trip: ")[2].split()[0])
    assert found == pytest.approx(psnr(Image.open(tmp_path / "again.png"), scene()), abs=0.01)


def test_a_grey_picture_of_16_bits_is_not_white() -> None:
    values = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024).astype(np.uint16)
    deep = Image.fromarray(values)
    assert deep.mode == "I;16"
    np.testing.assert_array_equal(np.asarray(open_picture("image", deep))[..., 0], values >> 8)
    np.testing.assert_array_equal(open_mask("mask_image", deep), values >= 1 << 15)
    deep.info["transparency"] = 1024
    opened = np.asarray(open_picture("image", deep))[..., 0]
    assert opened[0, 1] == 255
    assert opened[0, 2] == 2048 >> 8


def test_a_planned_request_from_a_picture_keeps_its_size(pipe: CascadePipeline, tmp_path: Path) -> None:
    scene(512, 256).save(tmp_path / "wide.png")
    first = pipe.plan(Request(prompt="x", init_image=str(tmp_path / "wide.png"), seeds=(0,)))
    again = pipe.plan(Request.from_json(first.request.to_json()))
    assert first.sizes.picture == again.sizes.picture == (256, 512)
    assert again.request == first.request
