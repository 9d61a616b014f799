"""What the semantic latents say: a scene's meaning, written on a grid of 6 x 6 points with 16 numbers each.

Stable Cascade learns its semantic latents; a world that is drawn can say outright what they should hold. Each point
knows the background's colour there and the nearest shape: its colour, its radius, its kind, and where in the shape's
own coordinates the point lies. Those coordinates are linear, so that stretching the grid to Stage B's, bilinearly,
keeps them exact: drawing a shape is then a matter of each position alone.

Learned latents were tried first (an autoencoder through a small deterministic decoder). After 40,000 pictures, 25
minutes of one core, they held every colour and place, but shapes only as blots; these need no training at all.

The semantic encoder learns to read these numbers from pictures, Stage C to make them from captions, and Stage B to draw
from them. All three can be trained beside one another; at the end Stage B and the encoder are trained as one.
"""

from __future__ import annotations

import numpy as np

from cascade_tiny.scenes import SHAPES, SIDE, Array, Scene

GRID = 6
CHANNELS = 16
COLOUR, SHAPE_COLOUR, AT, RADIUS, KIND = slice(0, 3), slice(3, 6), slice(6, 8), 8, slice(9, 16)

# Centre and spread that give each number about mean 0 and variance 1 over sampled scenes.
_MID_LEVEL, _LEVEL_SPREAD = 127.5, 90.0
_MID_LOG_RADIUS, _LOG_RADIUS_SPREAD = -1.85, 0.30
_AT_SPREAD = 1.7
_FARTHEST = 3.0  # radii: further out only the direction counts


def _codes() -> Array:
    """One code a kind: the rows of a Hadamard matrix without its constant column, [8, 7] of -1 and 1.

    Any two kinds are equally far apart and each of the seven numbers is balanced.
    """
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < len(SHAPES):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]).astype(np.float32)
    return matrix[: len(SHAPES), 1:]


KIND_CODES = _codes()


def meaning(scene: Scene) -> Array:
    """The semantic latents of a scene: float32 [16, 6, 6], about unit variance.

    Point (i, j) stands at (j / 5, i / 5) of the picture, corners included, as Stage B's bilinear stretching places it.
    """
    at = np.linspace(0, 1, GRID, dtype=np.float32)
    x, y = np.broadcast_to(at[None, :], (GRID, GRID)), np.broadcast_to(at[:, None], (GRID, GRID))
    centres = np.array([(s.x, s.y) for s in scene.shapes], np.float32)
    nearest = ((x[..., None] - centres[:, 0]) ** 2 + (y[..., None] - centres[:, 1]) ** 2).argmin(axis=2)

    latents = np.empty((CHANNELS, GRID, GRID), np.float32)
    ramp = 2 * (np.clip(at, 0.5 / SIDE, 1 - 0.5 / SIDE)) - 1
    shade = ramp[None, :] * np.float32(scene.shade[0]) + ramp[:, None] * np.float32(scene.shade[1])
    ground = np.clip(np.asarray(scene.rgb, np.float32)[:, None, None] + shade, 0, 255)
    latents[COLOUR] = (ground - _MID_LEVEL) / _LEVEL_SPREAD
    for index, shape in enumerate(scene.shapes):
        here = nearest == index
        rgb = (np.asarray(shape.rgb, np.float32) - _MID_LEVEL) / _LEVEL_SPREAD
        latents[SHAPE_COLOUR, here] = rgb[:, None]
        dx, dy = (x[here] - shape.x) / shape.radius, (y[here] - shape.y) / shape.radius
        cos, sin = np.cos(shape.angle), np.sin(shape.angle)
        own = np.stack([cos * dx + sin * dy, cos * dy - sin * dx])
        latents[AT, here] = np.clip(own, -_FARTHEST, _FARTHEST) / _AT_SPREAD
        latents[RADIUS, here] = (np.log(shape.radius) - _MID_LOG_RADIUS) / _LOG_RADIUS_SPREAD
        latents[KIND, here] = KIND_CODES[SHAPES.index(shape.kind)][:, None]
    return latents
