"""The drawn world of cascade-tiny: scenes of one to three shapes, their pictures and their captions.

A scene is plain data, drawn from signed distance functions: a pixel's coverage is its distance to the outline, clipped
to one pixel, so edges are anti-aliased without supersampling and a picture costs about a millisecond.

Coordinates are fractions of the picture's side, x to the right and y downwards. Randomness is always an argument.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 256  # pixels

Array = NDArray[np.float32]

# Far enough apart that the nearest of them is the colour a person would name, also under the jitter below.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 38),
    "green": (34, 158, 62),
    "blue": (36, 78, 222),
    "yellow": (250, 218, 36),
    "white": (246, 246, 246),
    "black": (18, 18, 20),
    "orange": (248, 134, 18),
    "purple": (132, 40, 170),
    "pink": (250, 158, 196),
    "gray": (130, 132, 136),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.27, 0.50),
    "right": (0.73, 0.50),
    "top": (0.50, 0.27),
    "bottom": (0.50, 0.73),
    "center": (0.50, 0.50),
}
SIZES: dict[str, tuple[float, float]] = {"large": (0.205, 0.235), "small": (0.115, 0.135)}  # radius, uniform between
RELATIONS = ("left", "right", "above", "below")

_PLACE_JITTER = 0.02
_TILT = 0.16  # radians: enough to tell two seeds apart, too little to turn a square into a diamond
_COLOUR_JITTER = 5.0  # levels of 255, standard deviation
_SHADE = 9.0  # levels of 255: how far a background may brighten towards one side
_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One drawn shape.

    Attributes:
        kind: one of `SHAPES`.
        colour: a name in `COLOURS`.
        size: a name in `SIZES`.
        x, y: its centre, 0..1.
        radius: half its extent, a fraction of the side.
        angle: tilt in radians.
        rgb: the colour drawn, levels 0..255.
    """

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One to three shapes on a background.

    Attributes:
        shapes: in the order captions name them.
        layout: "place" (one shape), a relation of the first to the second, or "row" / "column" of three.
        place: a name in `PLACES`; only where the layout is "place".
        background: a name in `COLOURS`, never a colour of a shape.
        rgb: the background as drawn, levels 0..255.
        shade: (dx, dy), how many levels the background brightens from the middle to the right and to the bottom edge.
    """

    shapes: tuple[Shape, ...]
    layout: str
    place: str | None
    background: str
    rgb: tuple[float, float, float]
    shade: tuple[float, float]


@dataclass(frozen=True)
class Wish:
    """What a caption of one shape asks for; None where it leaves the choice open."""

    colour: str
    kind: str
    size: str | None = None
    place: str | None = None
    background: str | None = None


def plain_shape(kind: str, x: float, y: float, radius: float, angle: float = 0.0) -> Shape:
    """A shape of which only the outline matters."""
    return Shape(kind=kind, colour="red", size="large", x=x, y=y, radius=radius, angle=angle, rgb=(0, 0, 0))


# --- drawing ------------------------------------------------------------


def distance(kind: str, x: Array, y: Array) -> Array:
    """Signed distance to a shape of radius about one, negative inside.

    Args:
        kind: one of `SHAPES`.
        x: float32, any shape: coordinates around the centre, to the right.
        y: float32, same shape, downwards.

    Returns:
        float32, same shape: exact near the outline, which is all that coverage needs.
    """
    if kind == "circle":
        return np.hypot(x, y) - np.float32(0.92)
    if kind == "ring":
        return np.abs(np.hypot(x, y) - np.float32(0.75)) - np.float32(0.23)
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.80)
    if kind == "diamond":
        across, along = np.float32(0.70), np.float32(1.08)
        outside: Array = (np.abs(x) * along + np.abs(y) * across - across * along) / np.hypot(across, along)
        return outside
    if kind == "cross":
        ax, ay = np.abs(x), np.abs(y)
        long, thick = np.float32(0.98), np.float32(0.32)
        return np.minimum(np.maximum(ax - long, ay - thick), np.maximum(ax - thick, ay - long))
    if kind == "triangle":
        return _radial(x, y - np.float32(0.22), corners=3, outer=1.18, inner=0.59)
    if kind == "star":
        return _radial(x, y - np.float32(0.06), corners=5, outer=1.12, inner=0.50)
    if kind == "heart":
        return _heart(x, y)
    raise ValueError(f"unknown shape {kind!r}; known are {', '.join(SHAPES)}")


def _radial(x: Array, y: Array, corners: int, outer: float, inner: float) -> Array:
    """Distance to a star or regular polygon: every outline is one segment, seen through the folded angle."""
    sector = np.float32(np.pi / corners)
    radius = np.hypot(x, y)
    fold = np.abs(np.mod(np.arctan2(x, -y) + sector, 2 * sector) - sector)  # 0 at a corner, `sector` between two
    px, py = radius * np.cos(fold), radius * np.sin(fold)
    bx, by = inner * np.cos(sector) - outer, inner * np.sin(sector)
    length = np.float32(np.hypot(bx, by))
    ux, uy = np.float32(bx) / length, np.float32(by) / length
    dx, dy = px - np.float32(outer), py
    along = np.clip(dx * ux + dy * uy, 0, length)
    side = dx * uy - dy * ux  # positive outside: the centre lies to the other side of the segment
    outline: Array = np.hypot(dx - along * ux, dy - along * uy) * np.sign(side)
    return outline


def _heart(x: Array, y: Array) -> Array:
    """A square on its tip with two half discs on its upper sides (after Inigo Quilez's distance functions)."""
    scale = np.float32(1.72)
    ax, up = np.abs(x) / scale, (np.float32(0.98) - y) / scale
    lobe = np.hypot(ax - np.float32(0.25), up - np.float32(0.75)) - np.float32(np.sqrt(2) / 4)
    diagonal = np.float32(0.5) * np.maximum(ax + up, 0)
    notch = np.hypot(ax, up - 1)
    flank = np.minimum(notch, np.hypot(ax - diagonal, up - diagonal)) * np.sign(ax - up)
    outline: Array = np.where(ax + up > 1, lobe, flank) * scale
    return outline


def mask(shape: Shape, side: int = SIDE) -> Array:
    """How much of each pixel a shape covers: float32 [side, side], 0..1."""
    canvas = np.zeros((side, side), np.float32)
    rows, columns, cover = _coverage(shape, side)
    canvas[rows, columns] = cover
    return canvas


def _coverage(shape: Shape, side: int) -> tuple[slice, slice, Array]:
    """The box a shape lies in, as rows and columns, and its coverage there."""
    reach = 1.3 * shape.radius * side + 1
    first_x, last_x = (int(np.clip(shape.x * side + d, 0, side)) for d in (-reach, reach + 1))
    first_y, last_y = (int(np.clip(shape.y * side + d, 0, side)) for d in (-reach, reach + 1))
    pixel = 1 / (shape.radius * side)
    dx = ((np.arange(first_x, last_x, dtype=np.float32) + 0.5) - shape.x * side) * np.float32(pixel)
    dy = ((np.arange(first_y, last_y, dtype=np.float32) + 0.5) - shape.y * side) * np.float32(pixel)
    cos, sin = np.float32(np.cos(shape.angle)), np.float32(np.sin(shape.angle))
    x = cos * dx[None, :] + sin * dy[:, None]
    y = cos * dy[:, None] - sin * dx[None, :]
    cover = np.clip(np.float32(0.5) - distance(shape.kind, x, y) / np.float32(pixel), 0, 1)
    return slice(first_y, last_y), slice(first_x, last_x), cover


def draw(scene: Scene, side: int = SIDE) -> NDArray[np.uint8]:
    """Draws a scene: uint8 [side, side, 3]."""
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    shade = ramp[None, :] * np.float32(scene.shade[0]) + ramp[:, None] * np.float32(scene.shade[1])
    picture = shade[:, :, None] + np.asarray(scene.rgb, np.float32)
    for shape in scene.shapes:
        rows, columns, cover = _coverage(shape, side)
        box = picture[rows, columns]
        box += cover[:, :, None] * (np.asarray(shape.rgb, np.float32) - box)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


# --- choosing ------------------------------------------------------------


def held_out(size: str, colour: str, kind: str, place: str, background: str) -> bool:
    """Whether this combination is kept from training, so that accuracy is measured on captions nobody trained on."""
    return zlib.crc32(f"{size} {colour} {kind} {place} {background}".encode()) % _HELD_OUT_ONE_IN == 0


def held_out_wishes() -> list[Wish]:
    """Every combination of one shape that training never sees, in a fixed, mixed order."""
    wishes = [
        Wish(colour, kind, size, place, background)
        for size in SIZES
        for colour in COLOURS
        for kind in SHAPES
        for place in PLACES
        for background in COLOURS
        if background != colour and held_out(size, colour, kind, place, background)
    ]
    order = np.random.default_rng(0).permutation(len(wishes))
    return [wishes[i] for i in order]


def sample(rng: np.random.Generator) -> Scene:
    """Draws a scene at random; a scene of one shape never shows a held-out combination."""
    count = int(rng.choice(3, p=(0.7, 0.18, 0.12))) + 1
    if count > 1:
        return _sample_several(rng, count)
    while True:
        colour, background = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
        kind, size, place = str(rng.choice(SHAPES)), str(rng.choice(list(SIZES))), str(rng.choice(list(PLACES)))
        if not held_out(size, colour, kind, place, background):
            return scene_of(Wish(colour, kind, size, place, background), rng)


def scene_of(wish: Wish, rng: np.random.Generator) -> Scene:
    """A scene of one shape as wished; what the wish leaves open is drawn at random."""
    colours = list(COLOURS)
    background = wish.background or str(rng.choice([c for c in colours if c != wish.colour]))
    place = wish.place or str(rng.choice(list(PLACES)))
    size = wish.size or str(rng.choice(list(SIZES)))
    shape = _shape(wish.kind, wish.colour, size, PLACES[place], rng)
    return _scene((shape,), "place", place, background, rng)


def _sample_several(rng: np.random.Generator, count: int) -> Scene:
    names = [str(c) for c in rng.choice(list(COLOURS), count + 1, replace=False)]
    kinds = [str(k) for k in rng.choice(SHAPES, count)]
    if count == 2:
        layout = str(rng.choice(RELATIONS))
        first, second = {"left": "left", "right": "right", "above": "top", "below": "bottom"}[layout], ""
        second = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[first]
        centres = [PLACES[first], PLACES[second]]
        sizes = [str(s) for s in rng.choice(list(SIZES), 2)]
    else:
        layout = str(rng.choice(("row", "column")))
        steps = (0.19, 0.50, 0.81)
        centres = [(s, 0.5) if layout == "row" else (0.5, s) for s in steps]
        sizes = ["small"] * 3
    shapes = tuple(_shape(k, c, s, p, rng) for k, c, s, p in zip(kinds, names[1:], sizes, centres, strict=True))
    return _scene(shapes, layout, None, names[0], rng)


def _shape(kind: str, colour: str, size: str, centre: tuple[float, float], rng: np.random.Generator) -> Shape:
    x, y = (c + float(rng.uniform(-_PLACE_JITTER, _PLACE_JITTER)) for c in centre)
    radius = float(rng.uniform(*SIZES[size]))
    return Shape(
        kind=kind,
        colour=colour,
        size=size,
        x=x,
        y=y,
        radius=radius,
        angle=float(rng.uniform(-_TILT, _TILT)),
        rgb=_tint(colour, rng),
    )


def _scene(
    shapes: tuple[Shape, ...], layout: str, place: str | None, background: str, rng: np.random.Generator
) -> Scene:
    dx, dy = (float(d) for d in rng.uniform(-_SHADE, _SHADE, 2))
    return Scene(
        shapes=shapes,
        layout=layout,
        place=place,
        background=background,
        rgb=_tint(background, rng),
        shade=(dx, dy),
    )


def _tint(colour: str, rng: np.random.Generator) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in np.clip(rng.normal(COLOURS[colour], _COLOUR_JITTER), 0, 255))
    return red, green, blue


# --- saying ------------------------------------------------------------


def canonical(wish: Wish) -> str:
    """The full sentence of a wish: `a large red circle at the left on a blue background`."""
    words = ["a", wish.size, wish.colour, wish.kind]
    if wish.place:
        words += ["at", "the", wish.place]
    if wish.background:
        words += ["on", "a", wish.background, "background"]
    return " ".join(w for w in words if w)


_SINGLE = (
    ("a {size} {colour} {kind} at the {place} on a {background} background", 0.40),
    ("a {size} {colour} {kind} at the {place} on {background}", 0.04),
    ("{size} {colour} {kind}, {place}, {background} background", 0.05),
    ("a {colour} {kind} at the {place} on a {background} background", 0.08),
    ("a {size} {colour} {kind} on a {background} background", 0.08),
    ("a {colour} {kind} on a {background} background", 0.10),
    ("a {colour} {kind} on {background}", 0.04),
    ("a {colour} {kind} at the {place}", 0.05),
    ("a {size} {colour} {kind}", 0.04),
    ("a {colour} {kind}", 0.10),
    ("{colour} {kind}", 0.02),
)
_PAIR = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_TRIPLE = {"row": ("in a row", "from left to right"), "column": ("in a column", "from top to bottom")}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describes a scene in one of several phrasings, some of which leave things out."""
    if scene.layout == "place":
        shape = scene.shapes[0]
        weights = np.array([w for _, w in _SINGLE])
        phrase = _SINGLE[int(rng.choice(len(_SINGLE), p=weights / weights.sum()))][0]
        text = phrase.format(
            size=shape.size, colour=shape.colour, kind=shape.kind, place=scene.place, background=scene.background
        )
        return _article(text, rng)
    sized = bool(rng.random() < 0.5)
    named = [f"a {s.size} {s.colour} {s.kind}" if sized else f"a {s.colour} {s.kind}" for s in scene.shapes]
    if scene.layout in _PAIR:
        text = f"{named[0]} {rng.choice(_PAIR[scene.layout])} {named[1]}"
    else:
        text = f"{named[0]}, {named[1]} and {named[2]} {rng.choice(_TRIPLE[scene.layout])}"
    if rng.random() < 0.85:
        text += f" on a {scene.background} background"
    return _article(text, rng)


def _article(text: str, rng: np.random.Generator) -> str:
    """Half of the captions say `an orange`, as one should; the other half do not, as people and templates do."""
    return re.sub(r"\ba orange\b", "an orange", text) if rng.random() < 0.5 else text


def words() -> list[str]:
    """Every word and mark that captions are made of, in a fixed order: the tokenizer's vocabulary."""
    phrases = [p for p, _ in _SINGLE] + [p for several in (_PAIR, _TRIPLE) for pair in several.values() for p in pair]
    fixed = re.findall(r"\w+|[^\w\s]", re.sub(r"{\w+}", " ", " ".join(phrases)) + " a an and")
    return list(dict.fromkeys([*fixed, *SIZES, *COLOURS, *SHAPES, *PLACES]))


_ONE = re.compile(
    r"(?:an? )?(?:(?P<size>large|small) )?(?P<colour>{c}) (?P<kind>{s})"
    r"(?:,? (?:at the )?(?P<place>{p}))?(?:(?:,| on)? (?:an? )?(?P<background>{c2})(?: background)?)?".replace(
        "{c}", "|".join(COLOURS)
    )
    .replace("{c2}", "|".join(COLOURS))
    .replace("{s}", "|".join(SHAPES))
    .replace("{p}", "|".join(PLACES))
)


def parse(text: str) -> Wish:
    """Reads a caption of one shape back.

    Raises:
        ValueError: the text is no caption of one shape; the message shows the form.
    """
    match = _ONE.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is no caption of one shape, such as {canonical(Wish('red', 'circle'))!r}")
    found = match.groupdict()
    return Wish(found["colour"], found["kind"], found["size"], found["place"], found["background"])
