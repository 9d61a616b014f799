"""Tells whether a picture shows what its caption says. NumPy only; no network is asked.

Colours are told by the nearest one of `scenes.COLOURS`, shapes by laying the drawer's own masks over what was found, at
the same centre and area and at several tilts: the kind that overlaps best is the kind seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cascade_tiny import scenes
from cascade_tiny.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Wish

Picture = NDArray[np.float32]
Names = NDArray[np.intp]

_FRAME = 6  # pixels along the border that only ever show the background
_SHARE = 0.65  # of a shape's pixels that must have its colour; its blended outline may have another
_NEAR = 0.10  # a fraction of the side; places lie 0.23 apart
_OVERLAP = 0.60  # the least intersection over union that counts as a shape
_TILTS = (-0.16, -0.08, 0.0, 0.08, 0.16)
_GRID = 128  # shapes are compared at this side


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One shape that should be seen; `size` and `centre` are None where the caption leaves them open."""

    colour: str
    kind: str
    size: str | None
    centre: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a picture got right; of several shapes, all must be right.

    Attributes:
        valid: all numbers are finite and in 0..1.
        background: its colour.
        colour_at_place: the colour of every shape is where the shape should be.
        shape: every shape's kind.
        size: every shape's size.
    """

    valid: bool
    background: bool
    colour_at_place: bool
    shape: bool
    size: bool

    @property
    def right(self) -> bool:
        """Everything at once."""
        return self.valid and self.background and self.colour_at_place and self.shape and self.size


def judge(picture: Picture, asked: Wish | Scene) -> Verdict:
    """Judges a picture.

    Args:
        picture: float32 [256, 256, 3], 0..1.
        asked: what it should show. Of a scene its colours, kinds, sizes and places count, not its exact outlines.

    Raises:
        ValueError: the picture has another shape.
    """
    if picture.ndim != 3 or picture.shape[0] != picture.shape[1] or picture.shape[2] != 3:
        raise ValueError(f"a square picture [side, side, 3] is needed, not {list(picture.shape)}")
    expected, background = _expected(asked)
    if not np.isfinite(picture).all() or picture.min() < 0 or picture.max() > 1:
        return Verdict(valid=False, background=False, colour_at_place=False, shape=False, size=False)
    seen = name_pixels(picture, tuple(COLOURS))
    found_background = background is None or float(np.mean(_frame(seen) == _index(background))) >= 0.9
    # what the background really is decides where the shapes end, also when it is the wrong one
    ground = background if background and found_background else list(COLOURS)[np.bincount(_frame(seen)).argmax()]
    here = [e for e in expected if e.colour != ground]
    palette = (ground, *dict.fromkeys(e.colour for e in here))
    nearest = name_pixels(picture, palette)
    cells = _cells(expected, picture.shape[0])
    regions = {e: (nearest == palette.index(e.colour)) & cells[e] for e in here}
    stray = np.mean(nearest != 0) > 0 and np.mean(seen[nearest != 0] == _index(ground)) > 0.5
    placed = [_colour_at_place(seen, regions[e], e) if e in regions else False for e in expected]
    shapes = [p and see_shape(regions[e]) == e.kind for p, e in zip(placed, expected, strict=True)]
    sizes = [p and _size(regions[e], e) for p, e in zip(placed, expected, strict=True)]
    return Verdict(
        valid=True,
        background=found_background,
        colour_at_place=all(placed) and not stray,
        shape=all(shapes) and not stray,
        size=all(sizes),
    )


def _expected(asked: Wish | Scene) -> tuple[list[Expected], str | None]:
    if isinstance(asked, Wish):
        centre = PLACES[asked.place] if asked.place else None
        return [Expected(colour=asked.colour, kind=asked.kind, size=asked.size, centre=centre)], asked.background
    shapes = [Expected(colour=s.colour, kind=s.kind, size=s.size, centre=(s.x, s.y)) for s in asked.shapes]
    return shapes, asked.background


def _index(colour: str) -> int:
    return list(COLOURS).index(colour)


def _frame(values: Names) -> Names:
    inside = np.zeros(values.shape, bool)
    inside[_FRAME:-_FRAME, _FRAME:-_FRAME] = True
    return values[~inside]


def name_pixels(picture: Picture, palette: tuple[str, ...]) -> Names:
    """The index in `palette` of each pixel's nearest colour: [side, side]."""
    rgb = np.array([COLOURS[c] for c in palette], np.float32) / 255
    squares = picture @ rgb.T * -2 + (rgb**2).sum(axis=1)  # the pixel's own square is the same for every colour
    nearest: Names = squares.argmin(axis=2)
    return nearest


def _cells(expected: list[Expected], side: int) -> dict[Expected, NDArray[np.bool_]]:
    """The pixels nearer to each shape's place than to another's: a blended outline may have another shape's colour."""
    at = (np.arange(side) + 0.5) / side
    squares = [
        np.zeros((side, side))
        if e.centre is None
        else (at[None, :] - e.centre[0]) ** 2 + (at[:, None] - e.centre[1]) ** 2
        for e in expected
    ]
    nearest = np.argmin(squares, axis=0)
    return {e: nearest == i for i, e in enumerate(expected)}


def _colour_at_place(seen: Names, region: NDArray[np.bool_], expected: Expected) -> bool:
    # smaller than half of a small ring is a stain
    if region.mean() < 0.006 or np.mean(seen[region] == _index(expected.colour)) < _SHARE:
        return False
    if expected.centre is None:
        return True
    x, y = _centroid(region.astype(np.float32))
    return float(np.hypot(x - expected.centre[0], y - expected.centre[1])) < _NEAR


def _centroid(weights: NDArray[np.float32]) -> tuple[float, float]:
    """Centre of mass as fractions of the side."""
    side = len(weights)
    at = (np.arange(side) + 0.5) / side
    total = weights.sum()
    return float((weights.sum(axis=0) * at).sum() / total), float((weights.sum(axis=1) * at).sum() / total)


def _size(region: NDArray[np.bool_], expected: Expected) -> bool:
    radius = float(np.sqrt(region.mean() / _proportions(expected.kind)[0]))
    between = (SIZES["small"][1] + SIZES["large"][0]) / 2
    return expected.size is None or (radius > between) == (expected.size == "large")


@cache
def _proportions(kind: str) -> tuple[float, float, float]:
    """Area of a shape of radius 1, and where its centre of mass lies from its centre, x and y."""
    weights = scenes.mask(scenes.plain_shape(kind, 0.5, 0.5, 0.25), 512)
    x, y = _centroid(weights)
    return float(weights.mean()) / 0.25**2, (x - 0.5) / 0.25, (y - 0.5) / 0.25


def see_shape(region: NDArray[np.bool_]) -> str | None:
    """The kind of shape that a region [256, 256] looks like; None if it looks like none of them."""
    overlaps = {kind: overlap(region, kind) for kind in SHAPES}
    best = max(overlaps, key=lambda kind: overlaps[kind])
    return best if overlaps[best] >= _OVERLAP else None


def overlap(region: NDArray[np.bool_], kind: str) -> float:
    """The best intersection over union of a region and a kind's mask at the same centre of mass and area, 0..1."""
    side = len(region)
    soft = region.reshape(_GRID, side // _GRID, _GRID, side // _GRID).mean(axis=(1, 3), dtype=np.float32)
    if soft.sum() == 0:
        return 0.0
    area, dx, dy = _proportions(kind)
    x, y = _centroid(soft)
    radius = float(np.sqrt(soft.mean() / area))
    best = 0.0
    for tilt in _TILTS:
        cos, sin = np.cos(tilt), np.sin(tilt)
        at = (x - radius * float(cos * dx - sin * dy), y - radius * float(sin * dx + cos * dy))
        mask = scenes.mask(scenes.plain_shape(kind, *at, radius, tilt), _GRID)
        best = max(best, float(np.minimum(soft, mask).sum() / np.maximum(soft, mask).sum()))
    return best


def psnr(picture: Picture, reference: Picture) -> float:
    """Peak signal-to-noise ratio in dB, peak 1.0, computed in float64."""
    error = np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float(-10 * np.log10(max(float(error), 1e-12)))
