"""The canny filter that training uses gives OpenCV's edges: digests of what ``cv2.Canny(picture, 100, 200)`` gave."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from cascade_tiny import scenes
from cascade_tiny.edges import canny, control_edges

WHITE, RED = (246, 246, 246), (222, 32, 38)


def noise() -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (61, 47, 3), dtype=np.uint8)


def soft() -> NDArray[np.uint8]:
    coarse = np.random.default_rng(6).integers(0, 256, (9, 11, 3), dtype=np.uint16)
    picture = coarse.repeat(8, 0).repeat(8, 1)
    for axis in (0, 1) * 4:
        picture = (picture + np.roll(picture, 1, axis)) // 2
    return picture.astype(np.uint8)


def disc() -> NDArray[np.uint8]:
    y, x = np.mgrid[:64, :64]
    return np.where((((x - 30) ** 2 + (y - 33) ** 2) < 400)[..., None], RED, WHITE).astype(np.uint8)


# OpenCV 5.0.0
@pytest.mark.parametrize(
    ("picture", "count", "digest"),
    [(noise(), 1035, "10af100b1da64ca1"), (soft(), 1189, "d536fed6b6ae25a2"), (disc(), 128, "a41e4a9844ea0166")],
    ids=["noise", "soft", "disc"],
)
def test_edges_are_those_of_opencv(picture: NDArray[np.uint8], count: int, digest: str) -> None:
    edges = canny(picture)
    assert edges.sum() == count
    assert hashlib.sha256(np.packbits(edges).tobytes()).hexdigest()[:16] == digest


def test_edges_of_a_scene_follow_its_outline() -> None:
    wish = scenes.Wish("red", "square", "large", "center", "white")
    scene = scenes.scene_of(wish, np.random.default_rng(0))
    edges = control_edges(scenes.draw(scene))
    shape = scene.shapes[0]
    y, x = np.nonzero(edges)
    at = np.stack([(x + 0.5) / 224 - shape.x, (y + 0.5) / 224 - shape.y]) / shape.radius
    cos, sin = np.cos(shape.angle), np.sin(shape.angle)
    own = (np.array([[cos, sin], [-sin, cos]]) @ at).astype(np.float32)
    assert np.abs(scenes.distance("square", own[0], own[1])).max() * shape.radius * 224 < 2
    assert len(x) > 4 * 2 * 0.7 * shape.radius * 224
