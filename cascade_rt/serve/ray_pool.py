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
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..bundle import Bundle, find_bundle
from ..errors import CascadeError, plain, shown
from ..manifest import Manifest
from .batcher import Limits
from .orders import BusyError, Event, Failed, Finished, Order, Preview, UnavailableError
from .watch import Watch

APP = "cascade-rt"
DEPLOYMENT = "Engines"
RETRY_SECONDS = 0.25
DRAIN_SECONDS = 60.0
VERSION_SECONDS = 10.0
CONNECT_SECONDS = 10.0
HANDLE_QUEUE = 1000
"""Orders that wait in one front for a replica, at most."""


@dataclass(frozen=True)
class Accepted:
    """A replica took the order on."""


class Engines:
    """A replica: the batcher of one process, on the bundles that lie at the same places on every machine."""

    def __init__(self, version: str, places: Mapping[str, str], provider: str, limits: Limits) -> None:
        """Load everything; the replica is ready when a picture was made."""
        from .local import local_pool

        bundles = {name: find_bundle(place) for name, place in places.items()}
        self._pool = local_pool(bundles, provider, limits, 1, Watch())
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
            watch: told of pictures; calls are counted in the replicas alone.

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
        await job.begin()
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
        self._handle, self._order, self._watch = handle, order, watch
        self._end = asyncio.get_running_loop().time() + order.seconds
        self._answer: Any = None
        self._finished: set[int] = set()
        self._previewed: dict[int, int] = {}
        self._cancelled = False

    async def begin(self) -> None:
        """Ask a replica, and wait until it takes the order on.

        Raises:
            CascadeError: it does not, or no replica answers.
        """
        from ray.exceptions import RayActorError  # type: ignore[import-not-found,unused-ignore]
        from ray.serve.exceptions import BackPressureError  # type: ignore[import-not-found,unused-ignore]

        while True:
            self._answer = self._handle.draw.remote(self._order)
            try:
                event = await self._next()
            except RayActorError:  # the replica died; another takes its place
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except BackPressureError:
                raise BusyError("every replica is busy; try again later", 5.0) from None
            if isinstance(event, Failed):
                raise event.error
            return

    async def _next(self) -> Accepted | Event:
        """The replica's next word.

        Raises:
            UnavailableError: the order's time is over.
            StopAsyncIteration: there is no other.
        """
        left = self._end - asyncio.get_running_loop().time()
        try:
            event: Accepted | Event = await asyncio.wait_for(anext(self._answer), max(left, 0.0))
        except asyncio.TimeoutError:
            self.cancel()
            raise UnavailableError(f"the picture was not ready within {self._order.seconds:g} s", 5.0) from None
        return event

    async def events(self) -> AsyncIterator[Preview | Finished]:
        """What becomes of it; see `Job.events`. A replica that dies is replaced by another."""
        from ray.exceptions import RayActorError  # type: ignore[import-not-found,unused-ignore]

        outcome = "failed"
        try:
            while len(self._finished) < self._order.pictures:
                try:
                    event = await self._next()
                except RayActorError:
                    await asyncio.sleep(RETRY_SECONDS)
                    await self.begin()
                    continue
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Preview | Finished) and self._is_new(event):
                    yield event
            outcome = "finished"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            for _ in range(self._order.pictures):
                self._watch.ended(self._order.model, outcome)

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
        if self._answer is not None:
            self._answer.cancel()
