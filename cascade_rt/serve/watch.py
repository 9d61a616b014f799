"""Who is told of engine calls and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Watch:
    """Hears what a batcher does, from any thread, and does nothing with it; `metrics.Metrics` counts it."""

    @contextmanager
    def call(self, engine: str, rows: int) -> Iterator[None]:  # noqa: ARG002 - names of the interface
        """Within, an engine is called with that many rows."""
        yield

    def load(self, pictures: int) -> None:
        """That many pictures wait or are drawn."""

    def ended(self, model: str, outcome: str) -> None:
        """A picture ended: finished, cancelled, late or failed."""
