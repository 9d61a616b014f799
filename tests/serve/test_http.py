"""What stands around the routes: keys, bounds, clients that leave, metrics, logs, health."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest

from cascade_rt.serve.app import JsonLines
from cascade_rt.serve.limits import Limits

from .conftest import Service, metric, pixels_of, wait_until

GENERATIONS = "/v1/images/generations"
SHORT = {"prompt": "a star", "num_inference_steps": 2, "decoder_num_inference_steps": 1, "seed": 0}
LONG = {"prompt": "a star", "num_inference_steps": 1000, "seed": 0}


def test_health_and_metrics(service: Service) -> None:
    with service.http() as http:
        assert http.get("/health/live").json() == {"status": "live"}
        assert http.get("/health/ready").json() == {"status": "ready"}
        before = metric(service.metrics, "cascade_pictures_total", model="cascade-tiny", outcome="finished")
        assert http.post(GENERATIONS, json={**SHORT, "n": 2}).status_code == 200
        assert http.post(GENERATIONS, json={"prompt": 3}).status_code == 400
        wait_until(lambda: service.load == 0)
        text = http.get("/metrics").text
    after = metric(service.metrics, "cascade_pictures_total", model="cascade-tiny", outcome="finished")
    assert after == before + 2
    assert 'cascade_requests_total{route="/v1/images/generations",status="400"}' in text
    assert "cascade_ready 1.0" in text
    assert metric(service.metrics, "cascade_pictures_per_second") > 0
    for engine in ("text_encoder", "stage_c.step", "stage_b.step", "stage_a"):
        assert metric(service.metrics, "cascade_call_seconds_count", engine=engine) > 0
        assert metric(service.metrics, "cascade_call_rows_sum", engine=engine) > 0


def test_answers_have_an_id_and_take_the_clients(service: Service) -> None:
    with service.http() as http:
        own = http.get("/health/live", headers={"x-request-id": "my-own-id"})
        assert own.headers["x-request-id"] == "my-own-id"
        for odd in ("short", "x" * 65, "with space here"):
            assert http.get("/health/live", headers={"x-request-id": odd}).headers["x-request-id"].startswith("req-")


def test_without_a_key_there_is_no_service(make_service: Callable[..., Service]) -> None:
    guarded = make_service(keys=("first-key", "second-key"))
    for key in ("", "first-ke", "first-keyx", "SECOND-KEY"):
        with pytest.raises(openai.AuthenticationError) as caught:
            guarded.client(api_key=key or "none").images.generate(prompt="a star")
        assert caught.value.code == "invalid_api_key"
        assert "first" not in str(caught.value)
    assert guarded.client(api_key="second-key").images.generate(prompt="a star", extra_body=SHORT).data
    with guarded.http() as http:
        for path in ("/v1/models", "/metrics", "/v1/images/jobs/x", "/nowhere"):
            assert http.get(path).status_code == 401
        basic = {"authorization": "Basic first-key"}
        assert http.get("/v1/models", headers=basic).status_code == 401
        for path in ("/", "/health/live", "/health/ready", "/page/app.js"):
            assert http.get(path).status_code == 200


def test_a_full_queue_is_told_with_the_time_to_wait(make_service: Callable[..., Service]) -> None:
    small = make_service(Limits(pictures=2))
    stream = small.client().images.generate(prompt="a star", n=2, stream=True, extra_body=LONG)
    wait_until(lambda: small.load == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        small.client().images.generate(prompt="a star", extra_body=SHORT)
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    stream.close()
    wait_until(lambda: small.load == 0)
    assert small.client().images.generate(prompt="a star", extra_body=SHORT).data


def test_a_client_that_leaves_frees_its_rows(service: Service) -> None:
    with service.http() as http, pytest.raises(httpx2.ReadTimeout):
        http.post(GENERATIONS, json=LONG, timeout=0.5)
    wait_until(lambda: service.load == 0, 5)
    stream = service.client().images.generate(prompt="a star", stream=True, partial_images=1, extra_body=LONG)
    wait_until(lambda: service.load == 1)
    stream.close()
    wait_until(lambda: service.load == 0, 5)


def test_an_abandoned_picture_may_be_finished_and_fetched(make_service: Callable[..., Service]) -> None:
    patient = make_service(finish_abandoned=True)
    body = {**SHORT, "num_inference_steps": 200}
    with patient.http() as http:
        with pytest.raises(httpx2.ReadTimeout):
            http.post(GENERATIONS, json=body, timeout=0.2, headers={"x-request-id": "abandoned-one"})
        wait_until(lambda: http.get("/v1/images/jobs/abandoned-one").json()["answer"] is not None)
        answer = http.get("/v1/images/jobs/abandoned-one").json()["answer"]
    assert pixels_of(answer["data"][0]["b64_json"]).shape == (256, 256, 3)


def test_a_request_that_takes_too_long_is_unavailable(make_service: Callable[..., Service]) -> None:
    hasty = make_service(timeout=0.5)
    with hasty.http() as http:
        answer = http.post(GENERATIONS, json=LONG)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "unavailable"
    wait_until(lambda: hasty.load == 0)


@pytest.fixture(scope="module")
def bounded(make_service: Callable[..., Service]) -> Service:
    return make_service(body_bytes=100_000, body_seconds=0.5)


def test_large_bodies_are_refused(bounded: Service) -> None:
    with bounded.http() as http:
        for path in (GENERATIONS, "/v1/images/edits"):
            answer = http.post(path, content=b"x" * 100_001, headers={"content-type": "application/json"})
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"

        def chunks() -> object:
            for _ in range(11):
                yield b" " * 10_000

        answer = http.post(GENERATIONS, content=chunks(), headers={"content-type": "application/json"})
        assert answer.status_code == 413


def test_a_body_of_100_megabytes_is_refused_before_it_is_sent(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-length: 100000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_slow_bodies_are_refused(bounded: Service) -> None:
    with socket.create_connection(("127.0.0.1", bounded.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n{"
        )
        started = time.monotonic()
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 5


def test_slow_headers_are_refused(make_service: Callable[..., Service]) -> None:
    hasty = make_service(header_seconds=0.5)
    head = b"GET /health/live HTTP/1.1\r\nhost: a\r\n"
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as silent:
        assert silent.recv(1000) == b""
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as slow:
        slow.sendall(head)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert slow.recv(1000) == b""
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as kept:
        for _ in range(2):
            kept.sendall(head + b"\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"live"}'):
                answer += kept.recv(1000)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(1)  # between two requests nothing has to arrive
        kept.sendall(head)
        assert kept.recv(1000).startswith(b"HTTP/1.1 408")
    with hasty.http() as http:  # an answer may take longer
        assert http.post(GENERATIONS, json={**SHORT, "num_inference_steps": 100}).status_code == 200


def test_bodies_together_are_bounded(make_service: Callable[..., Service]) -> None:
    tight = make_service(bodies_bytes=150_000, body_seconds=5.0)
    head = (
        b"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        b"content-length: 120000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", tight.port), timeout=10) as first:
        first.sendall(head + b" " * 100_000)
        time.sleep(0.3)
        with tight.http() as http:
            answer = http.post(GENERATIONS, content=b" " * 90_000, headers={"content-type": "application/json"})
            assert answer.status_code == 429
    wait_until(lambda: _takes(tight))


def _takes(service: Service) -> bool:
    with service.http() as http:
        answer = http.post(GENERATIONS, content=b" " * 90_000, headers={"content-type": "application/json"})
        return answer.status_code == 400


def test_logs_are_lines_of_json_without_prompts(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("cascade_rt.serve").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO, "cascade_rt.serve"), service.http() as http:
        answer = http.post(GENERATIONS, json={**SHORT, "prompt": "my secret wish"})
        http.get("/health/live")
        mine: list[dict[str, Any]] = []

        def is_told() -> bool:  # requests that earlier tests left may end now, too
            lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
            assert "/health/live" not in [line.get("path") for line in lines]
            mine[:] = [line for line in lines if line.get("request_id") == answer.headers["x-request-id"]]
            return any(line["event"] == "request" for line in mine)

        wait_until(is_told)
    (told,) = [line for line in mine if line["event"] == "request"]
    assert told["status"] == 200
    assert told["path"] == GENERATIONS
    assert told["seed"] == 0
    assert told["request_id"].startswith("req-")
    assert "secret" not in json.dumps(mine)


def test_logs_hold_prompts_where_that_was_asked(
    make_service: Callable[..., Service], caplog: pytest.LogCaptureFixture
) -> None:
    chatty = make_service(log_prompts=True)
    with caplog.at_level(logging.INFO, "cascade_rt.serve"), chatty.http() as http:
        http.post(GENERATIONS, json={**SHORT, "prompt": "my open wish"})
        wait_until(lambda: any(getattr(r, "facts", {}).get("prompt") == "my open wish" for r in caplog.records))


def test_the_page_is_strict(service: Service) -> None:
    with service.http() as http:
        page = http.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        for path in ("/page/app.js", "/page/style.css", "/favicon.ico"):
            assert http.get(path).status_code == 200
        assert "style=" not in page.text
        assert "http://" not in page.text
        assert "https://" not in page.text
        assert " on" not in page.text.replace(" one", "").replace(" only", "")


def test_clients_at_once_get_what_they_get_alone(service: Service) -> None:
    def draw(seed: int) -> object:
        with service.http() as http:
            return pixels_of(http.post(GENERATIONS, json={**SHORT, "seed": seed}).json()["data"][0]["b64_json"])

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, range(8)))
    for seed in (0, 5):
        assert abs(together[seed] - draw(seed)).max() <= 1


def test_an_event_loop_that_closed_hears_nothing() -> None:
    from cascade_rt.serve.orders import Failed, Order
    from cascade_rt.serve.pool import LocalJob

    async def job() -> LocalJob:
        return LocalJob(None, Order(id="x", model="m", request=None))  # type: ignore[arg-type]

    asyncio.run(job()).tell(Failed(error=ValueError()))
