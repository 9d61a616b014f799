"""What the HTTP front asks of a pool of engines, and what it hears back. Plain data: it may cross processes."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import CascadeError
from ..plan import Plan
from ..request import Request

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Order:
    """A request of one client.

    Attributes:
        id: of the HTTP request.
        model: name of the bundle that draws.
        request: what to draw, with a seed for every picture.
        previews: unfinished pictures that the client wants of every picture, 0..3.
        deterministic: every engine call is for one picture alone, so that the same bytes come back every time.
        seconds: how long the client waits, from now on.
    """

    id: str
    model: str
    request: Request
    previews: int = 0
    deterministic: bool = False
    seconds: float = 600.0

    @property
    def pictures(self) -> int:
        """How many pictures are asked for."""
        return len(self.request.seeds or ())


@dataclass(frozen=True, kw_only=True)
class Preview:
    """An unfinished picture: the clean picture that the loop's state implies.

    Attributes:
        picture: 0 for the first of the order.
        index: 0 for the first preview of this picture.
        pixels: ``[H, W, 3]`` uint8.
    """

    picture: int
    index: int
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A picture.

    Attributes:
        picture: 0 for the first of the order.
        pixels: ``[H, W, 3]`` uint8.
        seconds: what passed in every part, ``queue`` first.
    """

    picture: int
    pixels: Pixels
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The order ends here.

    Attributes:
        error: what to say.
    """

    error: Exception


Event = Preview | Finished | Failed


class BusyError(CascadeError):
    """There is no room for more pictures now.

    Attributes:
        retry_after: seconds after which there probably is.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[BusyError], tuple[str, float]]:
        """Arguments, for another process."""
        return type(self), (str(self), self.retry_after)


class UnavailableError(BusyError):
    """The service starts, stops, or was too slow for the client's patience."""


class CancelledOrderError(CascadeError):
    """Somebody cancelled the order."""


class UnknownModelError(CascadeError, LookupError):
    """No bundle of this name is served."""


def data_uri(data: bytes) -> str:
    """A picture file as the ``data:`` URI that a `Request` takes: a request from outside never names a file."""
    return "data:image/unknown;base64," + base64.b64encode(data).decode("ascii")


def single(planned: Plan, seed: int) -> Plan:
    """The plan of one of an order's pictures.

    Args:
        planned: of a request for one picture.
        seed: of this picture.
    """
    return replace(planned, seeds=(seed,), request=replace(planned.request, seeds=(seed,)))
