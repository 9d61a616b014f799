"""The HTTP front: routes, and what stands before them (keys, bounds, logs, metrics)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import importlib.resources
import json
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..errors import CascadeError, RequestError, shown
from ..stages import CONTROLS
from . import api
from .metrics import CONTENT_TYPE, Metrics
from .orders import BusyError, CancelledOrderError, Finished, Order, Preview, UnavailableError
from .pool import Job, Pool

LOG = logging.getLogger("cascade_rt.serve")
KEEP_ALIVE_SECONDS = 10.0
PICTURES = ("image_prompts", "init_image", "mask_image", "control_image")
"""Fields that hold pictures."""
KEPT_ANSWERS = 32
KEPT_SECONDS = 600.0
_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/favicon.ico": ("favicon.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OPEN_ROUTES = ("/health/live", "/health/ready", *PAGE)
"""What is answered without a key: nothing of anybody's pictures."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the front behaves.

    Attributes:
        keys: accepted API keys; none: everybody is served.
        timeout: seconds that a request may take.
        body_bytes: of a body, at most.
        bodies_bytes: of all bodies that are being received, at most.
        body_seconds: that a body may take to arrive.
        header_seconds: that the headers of a request may take to arrive.
        loras: path of every LoRA file that a request may name, by its name.
        finish_abandoned: draw on for clients that left, and keep the answer for `KEPT_SECONDS`.
        log_prompts: whether logs may hold prompts.
    """

    keys: tuple[str, ...] = ()
    timeout: float = 600.0
    body_bytes: int = 32 << 20
    bodies_bytes: int = 512 << 20
    body_seconds: float = 30.0
    header_seconds: float = 20.0
    loras: Mapping[str, str] = field(default_factory=dict)
    finish_abandoned: bool = False
    log_prompts: bool = False


@dataclass
class Running:
    """A request for pictures that runs, or ran a moment ago.

    Attributes:
        job: what draws it.
        pictures: how many were asked for.
        finished: how many there are.
        status: running, completed, cancelled or failed.
        answer: of an abandoned one that was finished.
        ended: when, of `time.monotonic`.
    """

    job: Job
    pictures: int
    finished: int = 0
    status: Literal["running", "completed", "cancelled", "failed"] = "running"
    answer: dict[str, Any] | None = None
    ended: float | None = None


@dataclass
class State:
    """What all requests share.

    Attributes:
        pool: draws.
        settings: of the front.
        metrics: told of every answer.
        running: by their id, those that run and the last that ended.
        stopping: whether new requests are refused.
        failed: why the engines cannot draw.
        on_failure: called then; the server stops.
        tasks: that go on without a client.
    """

    pool: Pool
    settings: Settings
    metrics: Metrics
    running: OrderedDict[str, Running] = field(default_factory=OrderedDict)
    stopping: bool = False
    failed: BaseException | None = None
    on_failure: Callable[[], None] = lambda: None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    encoders: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "cascade-encode"))

    @property
    def ready(self) -> bool:
        """Whether requests for pictures are taken."""
        return self.pool.ready and not self.stopping

    def forget_old(self) -> None:
        """Let go of answers that nobody fetched."""
        now = time.monotonic()
        over = [key for key, one in self.running.items() if one.ended is not None]
        for index, key in enumerate(reversed(over)):
            ended = self.running[key].ended or now
            if index >= KEPT_ANSWERS or now - ended > KEPT_SECONDS:
                del self.running[key]


class HttpError(CascadeError):
    """An answer that is a refusal of HTTP's own: no key, too large, no such address.

    Attributes:
        refusal: what is answered.
    """

    def __init__(self, refusal: api.Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def make_app(pool: Pool, settings: Settings, metrics: Metrics) -> FastAPI:
    """The application.

    Args:
        pool: draws; it is started and closed with the application.
        settings: of the front.
        metrics: told of every answer.
    """
    state = State(pool=pool, settings=settings, metrics=metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(state))
        try:
            yield
        finally:
            state.stopping = True
            starting.cancel()
            for task in state.tasks:
                task.cancel()
            await pool.close()
            state.encoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="cascade-rt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.cascade = state
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(CascadeError, _answer_error)
    _add_images(app, state)
    _add_models(app, state)
    _add_operations(app, state)
    _add_page(app)
    app.add_middleware(Front, state=state)
    return app


async def _start(state: State) -> None:
    """Load the engines, while the liveness probe is answered already. A failure ends the server."""
    try:
        await state.pool.start()
    except Exception as error:
        state.failed = error
        state.on_failure()
        return
    LOG.info("ready", extra={"facts": {"models": list(state.pool.manifests)}})


# what is drawn


def _add_images(app: FastAPI, state: State) -> None:
    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("the body must be JSON; send the header content-type: application/json")
        fields = api.read_json(await request.body())
        return await _draw(request, state, fields, "image_generation")

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise RequestError("an edit is sent as multipart/form-data, with the picture as the part 'image'")
        return await _draw(request, state, await _form_fields(request), "image_edit")

    @app.get("/v1/images/jobs/{job_id}")
    async def job(job_id: str) -> Response:
        one = _running(state, job_id)
        body = {"id": job_id, "object": "image.job", "status": one.status, "pictures": one.pictures}
        return _json({**body, "finished": one.finished, "answer": one.answer})

    @app.delete("/v1/images/jobs/{job_id}")
    async def cancel(job_id: str) -> Response:
        one = _running(state, job_id)
        one.job.cancel()
        return _json({"id": job_id, "object": "image.job", "cancelled": one.status == "running"})


def _running(state: State, job_id: str) -> Running:
    state.forget_old()
    one = state.running.get(job_id)
    if one is None:
        raise HttpError(api.Refusal(status=404, message=f"there is no job {shown(job_id)}", code="not_found"))
    return one


async def _form_fields(request: Request) -> dict[str, Any]:
    """The fields of an edit; pictures as base64."""
    texts: dict[str, list[str]] = {}
    files: dict[str, list[bytes]] = {}
    async with request.form(max_files=2 + api.MAX_IMAGES, max_fields=100) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(name.removesuffix("[]"), []).append(await value.read())
            else:
                texts.setdefault(name, []).append(value)
    fields = api.read_form(texts)
    pictures = files.pop("image", [])
    if len(pictures) != 1:
        raise RequestError(
            f"there are {len(pictures)} pictures as the part 'image'; one picture is edited, and others are varied as "
            "image_prompts",
            field="image",
        )
    fields["init_image"] = api.base64_of(pictures[0])
    for part, name in (("mask", "mask_image"), ("control_image", "control_image")):
        found = files.pop(part, [])
        if len(found) > 1:
            raise RequestError(f"there are {len(found)} pictures as the part {part!r}; give one", field=part)
        if found:
            fields[name] = api.base64_of(found[0])
    if prompts := files.pop("image_prompts", []):
        fields["image_prompts"] = [api.base64_of(data) for data in prompts]
    if files:
        name = next(iter(files))
        raise RequestError(
            f"the file {shown(name)} is not accepted; files are image, mask, image_prompts and control_image",
            field=name,
        )
    return fields


async def _draw(
    request: Request, state: State, fields: dict[str, Any], kind: Literal["image_generation", "image_edit"]
) -> Response:
    """Plan, take on, and answer with pictures or with a stream of them."""
    settings = state.settings
    call = await _off_loop_if_large(
        state,
        fields,
        lambda: api.call_of(fields, state.pool.manifests, settings.loras, kind, request.state.id, settings.timeout),
    )
    if not state.ready:
        raise UnavailableError("the service is starting or stopping; try again later", 2.0)
    job = await state.pool.submit(call.order)
    state.forget_old()
    one = state.running[call.order.id] = Running(job=job, pictures=call.order.pictures)
    request.state.facts.update(_told(call.order, settings.log_prompts))
    if call.stream:
        return EventStream(_stream(state, call, one), job)
    work = asyncio.create_task(_collect(state, call, one))
    left = asyncio.create_task(_client_left(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return _json(work.result())
        if settings.finish_abandoned:
            state.tasks.add(work)
            work.add_done_callback(lambda task: _keep(state, one, task))
        else:
            job.cancel()
            work.cancel()
        request.state.facts["left"] = True
        return Response(status_code=499)
    except asyncio.CancelledError:
        job.cancel()
        work.cancel()
        raise
    finally:
        left.cancel()


class EventStream(StreamingResponse):
    """A stream of server-sent events; its job ends with it, also where the client left before the first event."""

    def __init__(self, blocks: AsyncIterator[bytes], job: Job) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(blocks, headers=headers, media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _off_loop_if_large(state: State, fields: dict[str, Any], make: Callable[[], api.Call]) -> api.Call:
    """Bodies with pictures are read on a thread: base64 of megabytes takes a while."""
    if any(fields.get(name) is not None for name in PICTURES):
        return await asyncio.get_running_loop().run_in_executor(state.encoders, make)
    return make()


def _keep(state: State, one: Running, task: asyncio.Task[Any]) -> None:
    state.tasks.discard(task)
    if not task.cancelled() and task.exception() is None:
        one.answer = task.result()


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _pictures(state: State, call: api.Call, one: Running) -> AsyncIterator[tuple[Preview | Finished, str]]:
    """What becomes of an order, encoded; the record of it is kept."""
    loop = asyncio.get_running_loop()
    try:
        async with contextlib.aclosing(one.job.events()) as events:  # type: ignore[type-var]
            async for event in events:
                text = await loop.run_in_executor(state.encoders, api.encoded, call, event)
                one.finished += isinstance(event, Finished)
                yield event, text
        one.status = "completed"
    except (CancelledOrderError, asyncio.CancelledError, GeneratorExit):
        one.status = "cancelled"
        raise
    except Exception:
        one.status = "failed"
        raise
    finally:
        one.ended = time.monotonic()
        if one.status != "completed":
            one.job.cancel()


async def _collect(state: State, call: api.Call, one: Running) -> dict[str, Any]:
    """All pictures of an order, as an answer."""
    made: dict[int, tuple[str, Finished]] = {}
    async for event, text in _pictures(state, call, one):
        if isinstance(event, Finished):
            made[event.picture] = text, event
    return api.answer(call, made)


async def _stream(state: State, call: api.Call, one: Running) -> AsyncIterator[bytes]:
    """The blocks of a stream; a comment now and then tells proxies that it lives."""
    pictures = _pictures(state, call, one)
    following: asyncio.Task[tuple[Preview | Finished, str]] | None = None
    yield b": begun\n\n"
    try:
        while True:
            following = following or asyncio.ensure_future(anext(pictures))
            done, _ = await asyncio.wait({following}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield b": keep-alive\n\n"
                continue
            task, following = following, None
            try:
                event, text = task.result()
            except StopAsyncIteration:
                return
            except Exception as error:
                _log_error(error, call.order.id)
                refusal = api.refusal_of(error)
                yield api.server_event("error", refusal.body)
                return
            yield api.streamed(call, event, text)
    finally:
        if following is not None:
            following.cancel()
            with contextlib.suppress(BaseException):
                await following
        await pictures.aclose()  # type: ignore[attr-defined]


def _told(order: Order, with_prompt: bool) -> dict[str, Any]:
    """What a log may say of an order."""
    request = order.request
    told: dict[str, Any] = {"model": order.model, "pictures": order.pictures, "seed": (request.seeds or (None,))[0]}
    if request.width is not None:
        told["size"] = f"{request.width}x{request.height}"
    if with_prompt:
        told |= {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    return told


# models, health, metrics, page


def _add_models(app: FastAPI, state: State) -> None:
    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "cascade-rt"}

    @app.get("/v1/models")
    async def models() -> Response:
        data = []
        for name, manifest in state.pool.manifests.items():
            facts = manifest.model
            preset = manifest.sampling[facts.default_sampler]
            data.append(
                {
                    **described(name),
                    "size": f"{facts.width}x{facts.height}",
                    "num_inference_steps": preset.prior.num_inference_steps,
                    "guidance_scale": preset.prior.guidance_scale,
                    "takes_image_prompts": bool(manifest.records("image_encoder")),
                    "takes_edits": bool(manifest.records("effnet_encoder")),
                    "controls": [kind for kind in CONTROLS if manifest.records(f"controlnet.{kind}")],
                    "loras": list(state.settings.loras),
                }
            )
        return _json({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in state.pool.manifests:
            message = f"there is no model {shown(name)}; this service has {', '.join(state.pool.manifests)}"
            raise HttpError(api.Refusal(status=404, message=message, param="model", code="model_not_found"))
        return _json(described(name))


def _add_operations(app: FastAPI, state: State) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        return _json({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> Response:
        if state.ready:
            return _json({"status": "ready"})
        raise UnavailableError("the service is starting or stopping", 2.0)

    @app.get("/metrics")
    async def metrics() -> Response:
        state.metrics.ready(state.ready)
        return Response(state.metrics.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    folder = importlib.resources.files("cascade_rt.serve") / "page"

    def add(path: str, content: bytes, media_type: str) -> None:
        @app.get(path)
        async def page() -> Response:
            headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}
            return Response(content, media_type=media_type, headers=headers)

    for path, (name, media_type) in PAGE.items():
        add(path, (folder / name).read_bytes(), media_type)


# errors


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def _log_error(error: Exception, request_id: str) -> None:
    if not isinstance(error, CascadeError):
        LOG.error("failed", exc_info=error, extra={"facts": {"request_id": request_id}})


async def _answer_error(request: Request, error: Exception) -> Response:
    refusal = error.refusal if isinstance(error, HttpError) else api.refusal_of(error)
    _log_error(error, request.state.id)
    request.state.facts["error"] = refusal.code
    return _json(refusal.body, refusal.status, refusal.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {shown(request.url.path)}"
    if error.status_code in (404, 405):
        message = f"there is no {where}; see /v1/images/generations, /v1/images/edits, /v1/models"
        refusal = api.Refusal(status=error.status_code, message=message, code="not_found")
    else:  # a form that cannot be read
        message = f"the body cannot be read: {shown(error.detail)}"
        refusal = api.Refusal(status=error.status_code, message=message, code="invalid_value")
    return _json(refusal.body, refusal.status, {**refusal.headers, **(error.headers or {})})


# what stands before every route


class Front:
    """Keys, bounds of bodies, request ids, security headers, logs and metrics, around the application."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state
        self._digests = [hashlib.sha256(key.encode()).digest() for key in state.settings.keys]
        self._receiving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        taken = not _ID.fullmatch(asked) or asked in self._state.running
        request_id = f"req-{uuid.uuid4().hex}" if taken else asked
        facts: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "path": scope["path"][:200]}
        scope.setdefault("state", {}).update(id=request_id, facts=facts)
        started, status = time.perf_counter(), 0

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(raw=message["headers"])
                own["x-request-id"] = request_id
                own["x-content-type-options"] = "nosniff"
                own["referrer-policy"] = "no-referrer"
            await send(message)

        body = _Body(receive, self._state.settings, self)
        try:
            if refusal := self._refusal(scope, headers):
                await _json(refusal.body, refusal.status, refusal.headers)(scope, receive, answered)
            else:
                await self._app(scope, body.receive, answered)
        except ClientDisconnect:
            facts["left"] = True
        except asyncio.CancelledError:
            if status or not self._state.stopping:
                raise
            refusal = api.refusal_of(UnavailableError("the service stops", 2.0))  # the time of grace is over
            await _json(refusal.body, refusal.status, refusal.headers)(scope, receive, answered)
        except Exception as error:
            _log_error(error, request_id)
            if status:  # a part of the answer is out; the connection is cut
                raise
            refusal = api.refusal_of(error)
            await _json(refusal.body, refusal.status, refusal.headers)(scope, receive, answered)
        finally:
            body.end()
            seconds = time.perf_counter() - started
            route = scope.get("route")
            self._state.metrics.answered(getattr(route, "path", "other"), status, seconds)
            level = logging.DEBUG if scope["path"] in OPEN_ROUTES or scope["path"] == "/metrics" else logging.INFO
            LOG.log(level, "request", extra={"facts": {**facts, "status": status, "seconds": round(seconds, 4)}})

    def _refusal(self, scope: Scope, headers: Headers) -> api.Refusal | None:
        """Why a request is not even looked at."""
        if self._digests and scope["path"] not in OPEN_ROUTES and not self._has_key(headers):
            return api.Refusal(
                status=401,
                message="there is no API key in this request, or one that is not accepted; send the header "
                "Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > self._state.settings.body_bytes:
            return _too_large(self._state.settings.body_bytes)
        return None

    def _has_key(self, headers: Headers) -> bool:
        """Whether an accepted key is given; every key is compared, in a time that says nothing of them."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and scheme.lower() == "bearer"

    def hold(self, size: int) -> None:
        """Count bytes of bodies that are being received.

        Raises:
            BusyError: there is no room for them.
        """
        self._receiving += size
        if self._receiving > self._state.settings.bodies_bytes:
            raise BusyError("too many large bodies are being received; try again later", 5.0)

    def release(self, size: int) -> None:
        """Bodies that were received."""
        self._receiving -= size


class _Body:
    """The body of a request, with bounds of size and time."""

    def __init__(self, receive: Receive, settings: Settings, front: Front) -> None:
        self._receive, self._settings, self._front = receive, settings, front
        self._size = 0
        self._whole = False
        self._end: float | None = None

    async def receive(self) -> Message:
        """The next part.

        Raises:
            HttpError: it is too large or too slow.
            BusyError: there is no room for it.
        """
        if self._whole:
            return await self._receive()
        now = time.monotonic()
        self._end = self._end or now + self._settings.body_seconds
        try:
            message = await asyncio.wait_for(self._receive(), self._end - now)
        except asyncio.TimeoutError:
            raise HttpError(
                api.Refusal(
                    status=408,
                    message=f"the body did not arrive within {self._settings.body_seconds:g} s",
                    code="body_timeout",
                )
            ) from None
        size = len(message.get("body", b""))
        self._size += size
        self._front.hold(size)
        if self._size > self._settings.body_bytes:
            raise HttpError(_too_large(self._settings.body_bytes))
        self._whole = not message.get("more_body", False)
        return message

    def end(self) -> None:
        """The request was answered."""
        self._front.release(self._size)
        self._size = 0


def _too_large(most: int) -> api.Refusal:
    return api.Refusal(
        status=413, message=f"the body is too large; up to {most} bytes are accepted", code="body_too_large"
    )


class JsonLines(logging.Formatter):
    """A line of JSON for every record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)
