"""``--shapes`` on the command line; what it means is in `cascade_rt.profiles`."""

from __future__ import annotations

import re
from dataclasses import replace

from cascade_rt.checks import MAX_PIXELS, MIN_PIXELS
from cascade_rt.errors import RequestError, shown
from cascade_rt.profiles import DEFAULT_SHAPES, Shapes

HELP = (
    "default, full, square-PIXELS, and AXIS=MIN:OPT:MAX or ENGINE.AXIS=..., separated by commas, "
    "for example: square-1024,batch=2:2:4"
)


_SIZE = "([0-9]{1,9})"


def parse_shapes(text: str) -> Shapes:
    """Read ``--shapes``.

    Raises:
        RequestError: it is not of the form that `HELP` describes, or names an axis twice.
    """
    made = DEFAULT_SHAPES
    axes: dict[tuple[str, str], tuple[int, int, int]] = {}
    for index, item in enumerate(text.split(",")):
        if match := re.fullmatch(rf"([a-z_.]{{1,60}})={_SIZE}(?::{_SIZE}:{_SIZE})?", item):
            where, _, axis = match[1].rpartition(".")
            low, opt, high = (int(match[i] or match[2]) for i in (2, 3, 4))
            if not low <= opt <= high:
                raise RequestError(f"--shapes {item} is not accepted; its sizes must rise: MIN <= OPT <= MAX")
            if (where, axis) in axes:
                raise RequestError(f"--shapes names {match[1]} twice")
            axes[where, axis] = (low, opt, high)
        elif index == 0 and item in ("default", "full"):
            made = Shapes(preset="full" if item == "full" else "default")
        elif index == 0 and (match := re.fullmatch(rf"square-{_SIZE}", item)):
            side = int(match[1])
            if not MIN_PIXELS <= side <= MAX_PIXELS:
                raise RequestError(
                    f"--shapes {item} is not accepted; pictures have {MIN_PIXELS} to {MAX_PIXELS} pixels"
                )
            made = Shapes(preset="square", side=side)
        else:
            raise RequestError(f"--shapes {shown(item)} is not accepted; it takes {HELP}")
    return replace(made, axes=axes)
