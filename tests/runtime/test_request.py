"""Sizes and other things a caller types."""

from __future__ import annotations

import numpy as np
import pytest

from cascade_rt import RequestError
from cascade_rt.bundle import ModelFacts
from cascade_rt.image import crop_center, resize_bilinear, to_pil
from cascade_rt.request import as_array, as_prompts, check_batch, check_scale, plan_sizes

FACTS = ModelFacts("x", "big", "x", "x", 1024, 1024)


@pytest.mark.parametrize(
    ("pixels", "prior", "decoder", "picture"),
    [
        (1024, 24, 256, 1024),
        (512, 12, 128, 512),
        (2048, 48, 512, 2048),
        (832, 20, 208, 832),  # diffusers fails here
        (1216, 29, 304, 1216),  # and here
        (1000, 24, 256, 1000),  # rounded up, cropped
        (65, 2, 32, 65),
        (64, 2, 16, 64),
        (4096, 96, 1024, 4096),
    ],
)
def test_sizes(pixels: int, prior: int, decoder: int, picture: int) -> None:
    for sampler in ("original", "diffusers"):
        sizes = plan_sizes(FACTS, (1, 16), sampler, pixels, 1024)  # type: ignore[arg-type]
        assert (sizes.prior[0], sizes.decoder[0], sizes.picture[0]) == (prior, decoder, picture)
        assert (sizes.prior[1], sizes.decoder[1], sizes.picture[1]) == (24, 256, 1024)


def test_a_decoder_scale_of_its_own_is_followed() -> None:
    odd = ModelFacts("x", "custom", "x", "x", 128, 128, latent_dim_scale=4.0)
    sizes = plan_sizes(odd, (1, 4), "diffusers", 128, 256)
    assert sizes.prior == (3, 6)
    assert sizes.decoder == (12, 24)
    assert sizes.picture == (48, 96)


def test_a_stage_a_of_three_levels_is_not_cropped() -> None:
    """A decoder of another compression than the prior's: diffusers returns all that it makes, and so do we."""
    deep = ModelFacts("x", "custom", "x", "x", 128, 128, compression=8)
    assert plan_sizes(deep, (1, 16), "diffusers", 128, 256).picture == (256, 512)


def test_stage_c_may_have_a_grid_of_its_own() -> None:
    assert plan_sizes(FACTS, (2, 16), "original", 128, 256).prior == (4, 6)


@pytest.mark.parametrize("size", [0, -1, 63, 4097, 1_000_000, 64.0, "64", True, None])
def test_bad_sizes_are_named(size: object) -> None:
    with pytest.raises(RequestError, match=r"width .* is not accepted; it must be an integer from 64 to 4096"):
        plan_sizes(FACTS, (1, 16), "original", 1024, size)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, "4", None, True])
def test_bad_scales_are_named(scale: object) -> None:
    with pytest.raises(RequestError, match=r"guidance_scale .* finite number"):
        check_scale("guidance_scale", scale)


def test_batches_have_a_limit() -> None:
    check_batch(16, True, 32)
    with pytest.raises(RequestError, match="17 pictures at once, 34 rows with guidance, are not accepted"):
        check_batch(17, True, 32)


def test_prompts() -> None:
    assert as_prompts("prompt", "a") == ["a"]
    assert as_prompts("prompt", ["a", ""]) == ["a", ""]
    with pytest.raises(RequestError, match="entry of type int"):
        as_prompts("prompt", ["a", 3])
    with pytest.raises(RequestError, match="no Unicode text"):
        as_prompts("prompt", "bad \udcff byte")
    for bad in (3, [], None, b"a"):
        with pytest.raises(RequestError):
            as_prompts("prompt", bad)


def test_arrays_are_checked() -> None:
    assert as_array("x", [[1, 2]], (1, 2)).dtype == np.float32
    with pytest.raises(RequestError, match=r"shape \(2,\); it must be \('any', 2\)"):
        as_array("x", [1, 2], (None, 2))
    with pytest.raises(RequestError, match="NaN"):
        as_array("x", [float("nan")], (1,))
    with pytest.raises(RequestError, match="no array of numbers"):
        as_array("x", ["a"], (1,))


def test_resize_keeps_corners_and_planes() -> None:
    x = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    y = resize_bilinear(x, 7, 9)
    assert y.dtype == np.float32
    assert y.flags.c_contiguous
    assert (y[0, 0, 0, 0], y[0, 0, -1, -1]) == (0, 11)
    # a plane stays a plane
    np.testing.assert_allclose(np.diff(y, 2, axis=2), 0, atol=1e-5)
    np.testing.assert_allclose(np.diff(y, 2, axis=3), 0, atol=1e-5)
    np.testing.assert_array_equal(resize_bilinear(x, 3, 4), x)
    assert resize_bilinear(x, 1, 1).item() == 0
    assert resize_bilinear(np.ones((1, 1, 1, 1), dtype=np.float32), 2, 2).sum() == 4


def test_crop_and_pil() -> None:
    pixels = np.zeros((1, 6, 8, 3), dtype=np.float32)
    pixels[0, 1:5, 2:6] = 1
    cropped = crop_center(pixels, 4, 4)
    assert cropped.min() == 1
    image = to_pil(cropped)[0]
    assert image.size == (4, 4)
    assert image.getpixel((0, 0)) == (255, 255, 255)
