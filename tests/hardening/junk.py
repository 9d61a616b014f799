"""Values that people and programs hand over by mistake, and where they are put into a document."""

from __future__ import annotations

import copy
import datetime
import decimal
import fractions
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st

ESCAPES = "\x1b[31m\x1b]0;title\x07\x9b2J\u202e\r\n\t\x00"
HUGE = 10**400
MANY_DIGITS = int("9" * 4000)


class Hostile:
    """An object whose every conversion fails."""

    def __repr__(self) -> str:
        raise RuntimeError("\x1b[31m no")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("\x1b[31m no")

    def __float__(self) -> float:
        raise RuntimeError("no")

    def __index__(self) -> int:
        raise RuntimeError("no")

    def __len__(self) -> int:
        raise RuntimeError("no")

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("no")

    def __bool__(self) -> bool:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None  # type: ignore[assignment]


IN_JSON: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    2**64,
    10**30,
    0.5,
    -0.0,
    1e308,
    5e-324,
    "",
    "x",
    "²",
    "NaN",
    "1",
    "x" * 5000,
    ESCAPES,
    "../../etc/passwd",
    [],
    [None],
    [1, 2],
    ["x", 1],
    [[]],
    [[[[1]]]],
    {},
    {"x": 1},
    {"": None},
    {ESCAPES: {}},
]
"""What a JSON document may hold where something else belongs."""

IN_PYTHON: dict[str, Any] = {
    "nan": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "10**400": HUGE,
    "-10**400": -HUGE,
    "4000 digits": MANY_DIGITS,
    "complex": 1 + 2j,
    "numpy complex": np.complex64(1),
    "date": datetime.date(2020, 1, 1),
    "time": datetime.datetime(2020, 1, 1),
    "numpy date": np.datetime64("2020-01-01"),
    "span": datetime.timedelta(1),
    "decimal": decimal.Decimal("1.5"),
    "decimal nan": decimal.Decimal("nan"),
    "fraction": fractions.Fraction(1, 3),
    "bytes": b"a red circle",
    "bytearray": bytearray(b"x"),
    "superscript": "²",
    "escapes": ESCAPES,
    "lone surrogate": "\udcff",
    "true": True,
    "numpy true": np.True_,
    "numpy nan": np.float32("nan"),
    "numpy text": np.str_("x"),
    "numpy scalar array": np.array(3.0),
    "numpy matrix": np.zeros((2, 2)),
    "numpy objects": np.array([object()]),
    "numpy structure": np.zeros(2, dtype=[("a", "f4")]),
    "empty array": np.zeros((0,)),
    "set": {1, 2},
    "dict": {"a": 1},
    "list of nan": [float("nan")],
    "list of everything": [1, "x", None, 2j],
    "empty list": [],
    "nested list": [[[1]]],
    "generator": (x for x in "ab"),
    "range": range(3),
    "object": object(),
    "class": int,
    "function": len,
    "exception": ValueError("x"),
    "ellipsis": ...,
    "hostile": Hostile(),
}
"""What a Python caller may hand over."""

junk = st.one_of(
    st.sampled_from(IN_JSON),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.lists(st.integers(-2, 5) | st.booleans() | st.none() | st.text(max_size=2), max_size=4),
)
"""What stands in a document by mistake."""

Place = tuple[str | int, ...]


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every key and every entry of a document."""
    if place:
        yield place
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for step, inner in pairs:
        yield from places(inner, (*place, step))


def put(document: Any, place: Place, value: Any) -> Any:
    """The document with another value at a place."""
    if not place:
        return value
    made = copy.copy(document) if isinstance(document, dict) else list(document)
    made[place[0]] = put(document[place[0]], place[1:], value)
    return made


def without(document: Any, place: Place) -> Any:
    """The document without what lies at a place."""
    made: Any = copy.copy(document) if isinstance(document, dict) else list(document)
    if len(place) == 1:
        del made[place[0]]
    else:
        made[place[0]] = without(document[place[0]], place[1:])
    return made
