"""The semantic latents say what a scene shows, in numbers that are easy to learn and survive stretching."""

from __future__ import annotations

import numpy as np
import pytest

from cascade_tiny import scenes
from cascade_tiny.meaning import AT, CHANNELS, GRID, KIND, KIND_CODES, SHAPE_COLOUR, meaning
from cascade_tiny.scenes import SHAPES, Scene, Wish


def some_scenes(count: int) -> list[Scene]:
    rng = np.random.default_rng(11)
    return [scenes.sample(rng) for _ in range(count)]


def test_every_number_has_about_unit_variance() -> None:
    latents = np.stack([meaning(s) for s in some_scenes(1500)])
    assert latents.dtype == np.float32
    assert latents.shape[1:] == (CHANNELS, GRID, GRID)
    assert np.abs(latents.mean(axis=(0, 2, 3))).max() < 0.5
    assert np.abs(latents.std(axis=(0, 2, 3)) - 1).max() < 0.3


def test_kinds_are_equally_far_apart() -> None:
    apart = ((KIND_CODES[:, None] - KIND_CODES[None, :]) ** 2).sum(axis=2)
    assert KIND_CODES.shape == (len(SHAPES), 7)
    assert np.all(apart[~np.eye(len(SHAPES), dtype=bool)] == apart[0, 1])


@pytest.mark.parametrize("size", ["small", "large"])
def test_stretched_coordinates_still_draw_the_shape(size: str) -> None:
    """As Stage B stretches them: bilinear, corners aligned."""
    scene = scenes.scene_of(Wish("red", "star", size, "left", "blue"), np.random.default_rng(3))
    latents, side = meaning(scene), 128
    position = np.linspace(0, GRID - 1, side)
    low = np.minimum(position.astype(int), GRID - 2)
    weights = np.zeros((side, GRID))
    weights[np.arange(side), low] = 1 - (position - low)
    weights[np.arange(side), low + 1] = position - low
    x, y = (np.einsum("hw,Hh,Ww->HW", c, weights, weights).astype(np.float32) * np.float32(1.7) for c in latents[AT])
    drawn = scenes.distance("star", x, y) < 0
    # the stretched grid reaches from corner to corner, pixels' centres lie half a pixel inside
    corners = np.linspace(0, 1, side)
    shape = scene.shapes[0]
    cos, sin = np.cos(shape.angle), np.sin(shape.angle)
    dx, dy = (corners[None, :] - shape.x) / shape.radius, (corners[:, None] - shape.y) / shape.radius
    exact = (
        scenes.distance("star", (cos * dx + sin * dy).astype(np.float32), (cos * dy - sin * dx).astype(np.float32)) < 0
    )
    assert exact.sum() > 300
    assert (drawn != exact).sum() <= 2


def test_each_point_speaks_of_the_nearest_shape() -> None:
    scene = next(s for s in some_scenes(500) if s.layout == "left")
    latents = meaning(scene)
    for column, shape in ((0, scene.shapes[0]), (GRID - 1, scene.shapes[1])):
        assert np.array_equal(latents[KIND, 0, column], KIND_CODES[SHAPES.index(shape.kind)])
        assert np.allclose(latents[SHAPE_COLOUR, 0, column] * 90 + 127.5, shape.rgb, atol=1e-3)
