"""Orders that were taken on, and their pictures on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..conditions import Embeddings
from ..errors import RequestError
from ..noise import PictureNoise
from ..plan import Plan
from ..request import Tensors
from ..runner import Runner
from .orders import Event, Failed, Finished, Order, Preview

Array = NDArray[np.float32]
Tell = Callable[[Event], None]
"""Told of an order's events, on the engine thread; it returns at once."""


@dataclass(eq=False, kw_only=True)
class Asked:
    """An order that was taken on.

    Attributes:
        order: what is asked for.
        runner: whose engines draw it.
        given: the pictures that the request brings along, opened.
        texts: what the encoders made of the request; None until they have.
        refusal: why its texts are not accepted, which only encoding can tell.
    """

    order: Order
    runner: Runner
    given: Tensors
    texts: Embeddings | None = None
    refusal: RequestError | None = None


@dataclass(eq=False, kw_only=True)
class Picture:
    """One picture of an order on its way.

    Attributes:
        asked: the order that it belongs to.
        index: of the picture in the order.
        planned: of this picture alone.
        tell: told of what becomes of it.
        deadline: of `time.monotonic`.
        seconds: what passed in every part.
    """

    asked: Asked
    index: int
    planned: Plan
    tell: Tell
    deadline: float
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cancelled = False
        self.over = False
        self.has_begun = False
        self.previewed = -1
        self.noise = PictureNoise(self.planned.request.noise, self.planned.seeds, 1)
        self._since = time.monotonic()

    @property
    def order(self) -> Order:
        """The order that it belongs to."""
        return self.asked.order

    @property
    def runner(self) -> Runner:
        """Whose engines draw it."""
        return self.asked.runner

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.over or self.cancelled or time.monotonic() > self.deadline

    def note(self, part: str) -> None:
        """Note the time since the last note as that of a part."""
        now = time.monotonic()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._since, 4)
        self._since = now

    def preview(self, index: int, pixels: Array) -> None:
        """Tell of an unfinished picture, unless a later one was told of already."""
        if not self.gone and index > self.previewed:
            self.previewed = index
            self.tell(Preview(picture=self.index, index=index, pixels=as_bytes(pixels)))

    def finish(self, pixels: Array) -> None:
        """Tell of the finished picture."""
        self.over = True
        self.tell(Finished(picture=self.index, pixels=as_bytes(pixels), seconds=self.seconds))

    def fail(self, error: Exception) -> None:
        """Tell that it comes to nothing; once."""
        if not self.over:
            self.over = True
            self.tell(Failed(error=error))


def as_bytes(pixels: Array) -> NDArray[np.uint8]:
    """``[H, W, 3]`` float32 in 0..1 -> uint8, as `image.to_pil` rounds."""
    return (pixels * 255).round().astype(np.uint8)
