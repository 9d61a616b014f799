"""Who is told of engine calls and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Watch:
    """Hears what a batcher does, from any thread, and does nothing with it; `metrics.Metrics` counts it."""

    @contextmanager
    def call(self, engine: str, rows: int) -> Iterator[None]:  # noqa: ARG002 - names of the interface
        """Within, an engine is called with that many rows."""
        yield

    def taken(self, pictures: int) -> None:
        """That many pictures were taken on, and wait."""

    def begun(self) -> None:
        """One of those that wait is drawn from now on."""

    def ended(self, model: str, outcome: str, has_begun: bool, seconds: Mapping[str, float]) -> None:
        """A picture ended.

        Args:
            model: that drew it.
            outcome: finished, cancelled, late or failed.
            has_begun: whether `begun` was told of it.
            seconds: what passed in every part; see `orders.Finished`.
        """
