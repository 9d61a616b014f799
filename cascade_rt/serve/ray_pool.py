"""A pool of engines on Ray Serve: our HTTP front stays the only one, replicas are called by handles.

Every replica has the batcher of `batcher`. The seed of every picture is chosen in the front, so that an order may be
drawn again: where a replica dies, the front asks another one, and leaves out what the client has already. Several
fronts may use one cluster: the first that comes deploys, one with other bundles or another provider updates the
replicas one after the other, and one that ends leaves them as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..bundle import Bundle, find_bundle
from ..errors import CascadeError, plain, shown
from ..manifest import Manifest
from .limits import Limits
from .orders import (
    BusyError,
    CancelledOrderError,
    Event,
    Failed,
    Finished,
    Order,
    Preview,
    UnavailableError,
)
from .watch import Watch

APP = "cascade-rt"
DEPLOYMENT = "Engines"
RETRY_SECONDS = 0.25
LATE_SECONDS = 0.5
"""So long before its end, an order that a replica gives up is late; before that, the replica stops."""
DRAIN_SECONDS = 60.0
VERSION_SECONDS = 10.0
CONNECT_SECONDS = 10.0
HANDLE_QUEUE = 1000
"""Orders that wait in one front for a replica, at most."""


@dataclass(frozen=True)
class Accepted:
    """A replica took the order on."""


class ReplicaWatch(Watch):
    """Tells Ray of a replica's engine calls: the metrics of every node of the cluster have them for Prometheus."""

    def __init__(self) -> None:
        from ray.util.metrics import Histogram  # type: ignore[import-not-found,unused-ignore]

        from .metrics import CALL_SECONDS, ROWS

        self._seconds = Histogram(
            "cascade_call_seconds", "Time of an engine call", boundaries=list(CALL_SECONDS), tag_keys=("engine",)
        )
        self._rows = Histogram(
            "cascade_call_rows", "Rows of an engine call", boundaries=list(ROWS), tag_keys=("engine",)
        )

    @contextlib.contextmanager
    def call(self, engine: str, rows: int) -> Iterator[None]:
        """Note an engine call."""
        started = time.perf_counter()
        yield
        tags = {"engine": engine}
        self._seconds.observe(time.perf_counter() - started, tags)
        self._rows.observe(rows, tags)


class Engines:
    """A replica: the batcher of one process, on the bundles that lie at the same places on every machine."""

    def __init__(self, version: str, places: Mapping[str, str], provider: str, limits: Limits) -> None:
        """Load everything; the replica is ready when a picture was made."""
        from .local import local_pool

        bundles = {name: find_bundle(place) for name, place in places.items()}
        self._pool = local_pool(bundles, provider, limits, 1, ReplicaWatch())
        self._pool.load()
        self._version = version

    async def version(self) -> str:
        """Of what is deployed; see `RayPool.version`."""
        return self._version

    async def draw(self, order: Order) -> AsyncIterator[Accepted | Event]:
        """What becomes of an order."""
        try:
            job = await self._pool.submit(order)
        except CascadeError as error:
            yield Failed(error=error)
            return
        try:
            yield Accepted()
            async with contextlib.aclosing(job.events()) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        except CascadeError as error:
            yield Failed(error=error)
        finally:
            job.cancel()

    def check_health(self) -> None:
        """Ray asks now and then.

        Raises:
            RuntimeError: no pictures are made any more; the replica is replaced.
        """
        if not self._pool.ready:
            raise RuntimeError("the engine thread has ended")


class RayPool:
    """Engines in replicas of Ray Serve; see `pool.Pool`."""

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        provider: str,
        limits: Limits,
        replicas: tuple[int, int],
        address: str,
        watch: Watch,
    ) -> None:
        """Prepare.

        Args:
            bundles: by the names of their models; they lie at the same places on every machine of the cluster.
            provider: who runs the engines.
            limits: of every replica's batcher.
            replicas: least and most; Ray scales between them with the load.
            address: of the cluster; empty: one of this process, which ends with it.
            watch: told of pictures; calls are counted in the replicas, by `ReplicaWatch`.

        Raises:
            CascadeError: Ray is not installed, or the cluster does not answer.
        """
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            import ray.serve  # type: ignore[import-not-found,unused-ignore]  # noqa: F401 - to know that it is there
        except ImportError:
            raise CascadeError("--ray needs Ray Serve; install: pip install 'cascade-rt[ray]'") from None
        _connect(address)
        self.manifests: dict[str, Manifest] = {name: bundle.manifest for name, bundle in bundles.items()}
        self._places = {name: str(bundle.path.resolve()) for name, bundle in bundles.items()}
        self._provider, self._limits, self._replicas = provider, limits, replicas
        self._address = address
        self._watch = watch
        self._handle: Any = None
        self._running = 0

    @property
    def version(self) -> str:
        """Of what is deployed: another one is an update."""
        settings = (sorted(self._places.items()), self._provider, self._limits, self._replicas)
        digest = hashlib.sha256(repr(settings).encode())
        for name in sorted(self.manifests):
            digest.update(repr(self.manifests[name].files).encode())
        return digest.hexdigest()[:16]

    async def start(self) -> None:
        """Connect, and deploy what is not there; see `Pool.start`."""
        self._handle = await asyncio.to_thread(self._deploy)

    def _deploy(self) -> Any:
        from ray import serve  # type: ignore[import-not-found,unused-ignore]

        try:
            serve.start(proxy_location="Disabled")
            least, most = self._replicas
            if (found := self._found()) is not None:
                return found
            deployment = serve.deployment(
                Engines,
                name=DEPLOYMENT,
                num_replicas=None if least != most else least,
                autoscaling_config=None
                if least == most
                else {
                    "min_replicas": least,
                    "max_replicas": most,
                    "target_ongoing_requests": max(1, self._limits.rows // 2),
                },
                max_ongoing_requests=self._limits.pictures,
                max_queued_requests=HANDLE_QUEUE,
                graceful_shutdown_timeout_s=DRAIN_SECONDS,
                graceful_shutdown_wait_loop_s=0.5,
                health_check_period_s=2,
                ray_actor_options={
                    "num_cpus": 1,
                    "num_gpus": 0 if self._provider in ("cpu", "auto", "openvino") else 1,
                },
            )
            bound = deployment.bind(self.version, self._places, self._provider, self._limits)
            return serve.run(bound, name=APP, route_prefix=None).options(stream=True)
        except Exception as error:  # Ray raises many unrelated types
            raise CascadeError(f"Ray Serve cannot draw: {_last_line(error)}") from error

    def _found(self) -> Any:
        """The handle of what is deployed already; None where it is not this, or nothing."""
        from ray import serve  # type: ignore[import-not-found,unused-ignore]

        if APP not in serve.status().applications:
            return None
        handle = serve.get_deployment_handle(DEPLOYMENT, APP)
        try:
            same = handle.version.remote().result(timeout_s=VERSION_SECONDS) == self.version
        except Exception:  # it does not answer: it is deployed anew
            return None
        return handle.options(stream=True) if same else None

    @property
    def ready(self) -> bool:
        """Whether orders are drawn."""
        return self._handle is not None

    async def submit(self, order: Order) -> RayJob:
        """Take an order on, or refuse it at once; see `Pool.submit`."""
        if not self.ready:
            raise UnavailableError("the service is starting or stopping; try again later", 1.0)
        job = RayJob(self._handle, order, self._watch)
        try:
            await job.begin()
        except BaseException:
            job.cancel()
            raise
        return job

    async def close(self) -> None:
        """Leave the cluster; one of this process ends."""
        if self._handle is None:
            return
        self._handle = None
        import ray  # type: ignore[import-not-found,unused-ignore]
        from ray import serve  # type: ignore[import-not-found,unused-ignore]

        if not self._address:
            await asyncio.to_thread(serve.shutdown)
        ray.shutdown()


def _connect(address: str) -> None:
    """Join a cluster, or begin one; on the main thread, because Ray takes signal handlers.

    Raises:
        CascadeError: the cluster does not answer.
    """
    import ray  # type: ignore[import-not-found,unused-ignore]

    own: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal() and "//" not in address:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address or "local", namespace="serve", log_to_driver=False, **own)
    except Exception as error:  # Ray raises many unrelated types
        raise CascadeError(f"Ray at {shown(address or 'this machine')} does not answer: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    return plain(str(error).strip().splitlines()[-1]) if str(error).strip() else type(error).__name__


class RayJob:
    """An order of `RayPool`."""

    def __init__(self, handle: Any, order: Order, watch: Watch) -> None:
        loop = asyncio.get_running_loop()
        self._handle, self._order, self._watch = handle, order, watch
        self._end = loop.time() + order.seconds
        self._gone: asyncio.Future[None] = loop.create_future()  # done when nobody waits any more
        self._answer: Any = None
        self._finished: set[int] = set()
        self._previewed: dict[int, int] = {}
        self._open = 0
        """Pictures that `Watch` was told of, and that have not ended."""

    async def begin(self) -> None:
        """Ask a replica, and wait until it takes the order on.

        Raises:
            CascadeError: it does not, or no replica answers.
        """
        while True:
            self._answer = self._handle.draw.remote(self._order)
            event = await self._next()
            if event is None:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if isinstance(event, Failed):
                raise event.error
            if not self._open:
                self._open = self._order.pictures
                self._watch.taken(self._open)
                for _ in range(self._open):  # how long it waits in a replica is in what the replica says at the end
                    self._watch.begun()
            return

    async def _next(self) -> Accepted | Event | None:
        """The replica's next word; None: it died or ends, and another one is to be asked.

        Raises:
            UnavailableError: the order's time is over, or there are no replicas and will be none.
            BusyError: too many orders wait for a replica.
            CancelledOrderError: somebody cancelled the order.
        """
        from ray.exceptions import RayActorError  # type: ignore[import-not-found,unused-ignore]
        from ray.serve.exceptions import (  # type: ignore[import-not-found,unused-ignore]
            BackPressureError,
            DeploymentUnavailableError,
        )

        following: asyncio.Future[Any] = asyncio.ensure_future(anext(self._answer))
        left = max(self._end - asyncio.get_running_loop().time(), 0.0)
        try:
            await asyncio.wait({following, self._gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.done():
                raise CancelledOrderError("the request was cancelled")
            if not following.done():
                raise UnavailableError(f"the picture was not ready within {self._order.seconds:g} s", 5.0)
            event: Accepted | Event = following.result()
        except (RayActorError, StopAsyncIteration):
            return None
        except BackPressureError:
            raise BusyError("every replica is busy; try again later", 5.0) from None
        except DeploymentUnavailableError:
            raise UnavailableError("there are no replicas; Ray could not start them", 5.0) from None
        finally:
            following.cancel()
        ends = isinstance(event, Failed) and isinstance(event.error, UnavailableError)
        return None if ends and asyncio.get_running_loop().time() < self._end - LATE_SECONDS else event

    async def events(self) -> AsyncIterator[Preview | Finished]:
        """What becomes of it; see `Job.events`. A replica that dies is replaced by another."""
        try:
            while len(self._finished) < self._order.pictures:
                event = await self._next()
                if event is None:
                    await asyncio.sleep(RETRY_SECONDS)
                    await self.begin()
                elif isinstance(event, Failed):
                    raise event.error
                elif isinstance(event, Preview | Finished) and self._is_new(event):
                    if isinstance(event, Finished):
                        self._ended("finished", event.seconds)
                    yield event
        except UnavailableError:
            self._end_rest("late")
            raise
        except (CancelledOrderError, asyncio.CancelledError, GeneratorExit):
            self._end_rest("cancelled")
            raise
        except BaseException:
            self._end_rest("failed")
            raise

    def _ended(self, outcome: str, seconds: Mapping[str, float]) -> None:
        self._open -= 1
        self._watch.ended(self._order.model, outcome, True, seconds)

    def _end_rest(self, outcome: str) -> None:
        while self._open:
            self._ended(outcome, {})

    def _is_new(self, event: Preview | Finished) -> bool:
        """Whether the client does not have it yet: a second replica draws everything again, to the same pictures."""
        if event.picture in self._finished:
            return False
        if isinstance(event, Finished):
            self._finished.add(event.picture)
            return True
        if event.index <= self._previewed.get(event.picture, -1):
            return False
        self._previewed[event.picture] = event.index
        return True

    def cancel(self) -> None:
        """Nobody waits any more. To cancel the task that waits for a replica would not reach the replica."""
        if not self._gone.done():
            self._gone.set_result(None)
        self._end_rest("cancelled")
        if self._answer is not None:
            self._answer.cancel()
