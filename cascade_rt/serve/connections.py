"""Connections of which a request's headers do not arrive in time."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def timed_protocol(header_seconds: float) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP/1.1 over h11, with a bound on the time in which the headers of a request arrive.

    uvicorn bounds only the time between two requests. Without this bound, clients that send a byte a minute hold
    connections until none is left.

    Args:
        header_seconds: from the connection, or from the first byte of a later request, to the end of its headers.
            A connection that sent nothing is closed; one that sent a part is answered with status 408.
    """

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _began = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._timer = self.loop.call_later(header_seconds, self._give_up)

        def data_received(self, data: bytes) -> None:
            self._began = True
            if self._timer is None and not self._answers():
                self._timer = self.loop.call_later(header_seconds, self._give_up)
            super().data_received(data)
            if self._answers():
                self._stop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _answers(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            if self.transport.is_closing():
                return
            if self._began and self.conn.our_state is h11.IDLE:
                head = h11.Response(status_code=408, headers=[("connection", "close"), ("content-length", "0")])
                for event in (head, h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return TimedProtocol
