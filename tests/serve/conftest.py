"""A real uvicorn in a thread, with the shipped bundle behind it, and OpenAI's own client.

Nothing here waits without an end: clients and requests have time limits, and a service whose test failed is stopped
like any other.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="cascade-serve is not installed: pip install 'cascade-rt[serve]'")
pytest.importorskip("openai", reason="OpenAI's client is not installed: pip install openai")

import httpx2
import uvicorn
from openai import OpenAI
from PIL import Image

from cascade_rt.bundle import Bundle
from cascade_rt.manifest import MANIFEST
from cascade_rt.serve.app import Settings, State, make_app
from cascade_rt.serve.connections import timed_protocol
from cascade_rt.serve.limits import Limits
from cascade_rt.serve.local import local_pool
from cascade_rt.serve.metrics import Metrics

REQUEST_SECONDS = 120.0
"""That a request of the tests may take; the service gives it up then."""
CLIENT_SECONDS = 60.0
STOP_SECONDS = 30.0


class Service:
    """A service that runs in a thread of the tests; `start` begins, and `stop` ends it whatever runs."""

    def __init__(self, bundles: dict[str, Bundle], limits: Limits, settings: Settings) -> None:
        self.metrics = Metrics()
        self.pool = local_pool(bundles, "cpu", limits, 1, self.metrics)
        app = make_app(self.pool, settings, self.metrics)
        self.state: State = app.state.cascade
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app,
            http=timed_protocol(settings.header_seconds),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[self._socket])), name="service", daemon=True
        )

    def start(self) -> None:
        """Serve, and wait until the engines are loaded."""
        self._thread.start()
        wait_until(lambda: self.state.ready, 60)

    def client(self, **options: Any) -> OpenAI:
        options = {"api_key": "test", "max_retries": 0, "timeout": CLIENT_SECONDS, **options}
        return OpenAI(base_url=f"{self.url}/v1", **options)

    def http(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=CLIENT_SECONDS, **options)

    @property
    def load(self) -> int:
        """Pictures that wait or are drawn."""
        return sum(batcher.load for batcher in self.pool._batchers)

    def stop(self) -> None:
        """Tell it to end: requests that run are given up after two seconds."""
        self._server.should_exit = True

    def ended(self) -> bool:
        """Whether its thread ended, after up to `STOP_SECONDS`."""
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
        self._socket.close()
        return not self._thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def pixels_of(text: str) -> np.ndarray:
    """A picture in base64 as ``[H, W, 3]`` integers."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)


def metric(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="session")
def make_service(shipped: Path) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def make(limits: Limits | None = None, bundles: dict[str, Bundle] | None = None, **settings: Any) -> Service:
        own = Settings(**{"timeout": REQUEST_SECONDS, **settings})
        made.append(Service(bundles or {"cascade-tiny": Bundle(shipped)}, limits or Limits(), own))
        made[-1].start()
        return made[-1]

    yield make
    for service in made:
        service.stop()
    assert [service.url for service in made if not service.ended()] == []


@pytest.fixture(scope="session")
def service(make_service: Callable[..., Service]) -> Service:
    """One service for all tests that only ask it something."""
    return make_service()


@pytest.fixture(scope="session")
def client(service: Service) -> OpenAI:
    return service.client()


@pytest.fixture(scope="session")
def plain_service(
    make_service: Callable[..., Service],
    shipped: Path,
    link_bundle: Callable[[Path, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Service:
    """A service whose bundle has neither image encoder nor ControlNet."""
    place = link_bundle(shipped, tmp_path_factory.mktemp("plain") / "bundle")
    document = json.loads((place / MANIFEST).read_text())
    document["engines"] = [e for e in document["engines"] if not e["name"].startswith(("image_encoder", "controlnet."))]
    (place / MANIFEST).write_text(json.dumps(document))
    return make_service(bundles={"plain": Bundle(place)})
