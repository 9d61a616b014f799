"""The judge believes the drawer, and nobody who is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from cascade_tiny import scenes
from cascade_tiny.judge import Picture, judge, overlap, psnr
from cascade_tiny.scenes import COLOURS, PLACES, SHAPES, Scene, Wish


def draw(scene: Scene) -> Picture:
    return scenes.draw(scene).astype(np.float32) / 255


def blurred(picture: Picture, width: int = 5) -> Picture:
    kernel = np.ones(width) / width
    pad = width // 2

    def along(line: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.convolve(np.pad(line, pad, mode="edge"), kernel, "valid")

    for axis in (0, 1):
        picture = np.apply_along_axis(along, axis, picture)
    return picture.clip(0, 1).astype(np.float32)


@pytest.mark.parametrize("change", [lambda p: p, blurred], ids=["as drawn", "blurred"])
def test_drawn_scenes_are_accepted(change: Callable[[Picture], Picture]) -> None:
    rng = np.random.default_rng(5)
    verdicts = [judge(change(draw(s)), s) for s in (scenes.sample(rng) for _ in range(60))]
    assert np.mean([v.right for v in verdicts]) >= 0.98


@pytest.fixture
def wish() -> Wish:
    return Wish("red", "star", "large", "left", "yellow")


def drawn(wish: Wish) -> Picture:
    return draw(scenes.scene_of(wish, np.random.default_rng(7)))


def test_a_wish_is_accepted_and_open_wishes_too(wish: Wish) -> None:
    assert judge(drawn(wish), wish).right
    assert judge(drawn(wish), Wish("red", "star")).right


@pytest.mark.parametrize("place", [p for p in PLACES if p != "left"])
def test_a_wrong_place_is_rejected(wish: Wish, place: str) -> None:
    verdict = judge(drawn(dataclasses.replace(wish, place=place)), wish)
    assert not verdict.colour_at_place
    assert verdict.background


@pytest.mark.parametrize("colour", [c for c in COLOURS if c not in ("red", "yellow")])
def test_a_wrong_colour_is_rejected(wish: Wish, colour: str) -> None:
    verdict = judge(drawn(dataclasses.replace(wish, colour=colour)), wish)
    assert not verdict.colour_at_place
    assert verdict.background


@pytest.mark.parametrize("colour", [c for c in COLOURS if c not in ("red", "yellow")])
def test_a_wrong_background_is_rejected(wish: Wish, colour: str) -> None:
    verdict = judge(drawn(dataclasses.replace(wish, background=colour)), wish)
    assert not verdict.background
    assert verdict.shape


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("kind", SHAPES)
def test_each_shape_is_seen_as_itself_only(kind: str, size: str) -> None:
    wish = Wish("blue", kind, size, "center", "white")
    picture = blurred(drawn(wish), 3)
    assert judge(picture, wish).shape
    for other in SHAPES:
        assert other == kind or not judge(picture, dataclasses.replace(wish, kind=other)).shape


def test_a_wrong_size_is_rejected(wish: Wish) -> None:
    verdict = judge(drawn(dataclasses.replace(wish, size="small")), wish)
    assert not verdict.size
    assert verdict.shape


def test_an_empty_picture_is_rejected(wish: Wish) -> None:
    yellow = np.broadcast_to(np.array(COLOURS["yellow"], np.float32) / 255, (256, 256, 3))
    verdict = judge(yellow, wish)
    assert verdict.background
    assert not verdict.colour_at_place
    assert not verdict.shape


def test_a_picture_of_the_colour_alone_is_rejected(wish: Wish) -> None:
    red = np.broadcast_to(np.array(COLOURS["red"], np.float32) / 255, (256, 256, 3))
    assert not judge(red, wish).colour_at_place
    assert not judge(red, wish).background


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.01, -0.01])
def test_one_impossible_number_spoils_a_picture(wish: Wish, value: float) -> None:
    picture = drawn(wish)
    picture[3, 4, 1] = value
    assert not judge(picture, wish).valid
    assert not judge(picture, wish).right


def test_swapped_neighbours_are_rejected() -> None:
    rng = np.random.default_rng(2)
    pair = next(s for s in (scenes.sample(rng) for _ in range(1000)) if s.layout == "left")
    first, second = pair.shapes
    swapped = dataclasses.replace(
        pair,
        shapes=(dataclasses.replace(first, x=second.x, y=second.y), dataclasses.replace(second, x=first.x, y=first.y)),
    )
    assert judge(draw(pair), pair).right
    assert not judge(draw(swapped), pair).colour_at_place


def test_a_picture_of_another_form_is_refused(wish: Wish) -> None:
    with pytest.raises(ValueError, match="square picture"):
        judge(np.zeros((3, 256, 256), np.float32), wish)


def test_overlap_of_nothing_is_nothing() -> None:
    assert overlap(np.zeros((256, 256), bool), "circle") == 0


def test_psnr_has_a_fixed_peak() -> None:
    grey = np.full((8, 8, 3), 0.5, np.float32)
    assert psnr(grey, grey + np.float32(0.1)) == pytest.approx(20, abs=1e-4)
    assert psnr(grey, grey) == pytest.approx(120)
