"""Where orders are drawn: what the HTTP front needs to know of it, and the engines of this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from ..manifest import Manifest
from .batcher import Batcher
from .orders import Event, Failed, Finished, Order, Preview, UnavailableError
from .pictures import Picture

LATE_SECONDS = 5.0
"""How much later than the order's deadline the front gives up on engines that say nothing at all."""


class Job(Protocol):
    """An order that was taken on."""

    def events(self) -> AsyncIterator[Preview | Finished]:
        """What becomes of it, until the last picture is finished.

        Raises:
            CascadeError: it comes to nothing.
        """
        ...

    def cancel(self) -> None:
        """Nobody waits any more; its rows are free before the next step. Cancelling twice, or too late, is fine."""
        ...


class Pool(Protocol):
    """Engines that draw orders."""

    manifests: dict[str, Manifest]
    """Of every bundle, by the name of its model; the first is the default."""

    async def start(self) -> None:
        """Load all engines.

        Raises:
            CascadeError: they cannot make a picture.
        """
        ...

    @property
    def ready(self) -> bool:
        """Whether orders are drawn."""
        ...

    async def submit(self, order: Order) -> Job:
        """Take an order on, or refuse it at once.

        Raises:
            RequestError: the bundle does not take it.
            BundleError: the bundle lacks an engine.
            BusyError: there is no room.
            UnavailableError: the service starts or stops.
        """
        ...

    async def close(self) -> None:
        """Stop, and give back every engine."""
        ...


class LocalPool:
    """Engines of this process: one batcher, or several that each have their own."""

    def __init__(self, batchers: Sequence[Batcher], manifests: dict[str, Manifest]) -> None:
        """Prepare.

        Args:
            batchers: an order goes to the one with the fewest pictures.
            manifests: of every bundle.
        """
        self.manifests = manifests
        self._batchers = list(batchers)

    def load(self) -> None:
        """Load all engines, and wait until they are; see `Pool.start`."""
        for batcher in self._batchers:
            batcher.start()
        for batcher in self._batchers:
            batcher.wait_ready()

    async def start(self) -> None:
        """Load all engines; see `Pool.start`."""
        await asyncio.to_thread(self.load)

    @property
    def ready(self) -> bool:
        """Whether orders are drawn."""
        return all(batcher.ready for batcher in self._batchers)

    async def submit(self, order: Order) -> LocalJob:
        """Take an order on, or refuse it at once; see `Pool.submit`."""
        if not self.ready:
            raise UnavailableError("the service is starting or stopping; try again later", 1.0)
        batcher = min(self._batchers, key=lambda one: one.load)
        job = LocalJob(batcher, order)
        request = order.request
        brought = (request.images, request.init_image, request.control_image, request.loras)
        if any(brought):  # to open files takes a while
            job.pictures = await asyncio.to_thread(batcher.submit, order, job.tell)
        else:
            job.pictures = batcher.submit(order, job.tell)
        return job

    async def close(self) -> None:
        """Stop, and give back every engine."""
        for batcher in self._batchers:
            await asyncio.to_thread(batcher.close)


class LocalJob:
    """An order of `LocalPool`."""

    def __init__(self, batcher: Batcher, order: Order) -> None:
        """Prepare to hear of it, on the event loop that runs now."""
        self.pictures: list[Picture] = []
        self._batcher, self._order = batcher, order
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[Event] = asyncio.Queue()

    def tell(self, event: Event) -> None:
        """Take an event from the engine thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody hears
            self._loop.call_soon_threadsafe(self._heard.put_nowait, event)

    async def events(self) -> AsyncIterator[Preview | Finished]:
        """What becomes of it; see `Job.events`."""
        open_pictures = self._order.pictures
        end = self._loop.time() + self._order.seconds + LATE_SECONDS
        while open_pictures:
            try:
                event = await asyncio.wait_for(self._heard.get(), end - self._loop.time())
            except asyncio.TimeoutError:
                raise UnavailableError("the engines do not answer", 60.0) from None
            if isinstance(event, Failed):
                self.cancel()  # the other pictures of the order
                raise event.error
            open_pictures -= isinstance(event, Finished)
            yield event

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._batcher.cancel(self.pictures)
