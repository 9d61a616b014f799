"""Bad input over HTTP: every case is a clear refusal in OpenAI's shape, none is a failure of the service."""

from __future__ import annotations

import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from .conftest import Service

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
HUGE = 10**400


def _fields() -> Iterator[tuple[str, dict[str, Any]]]:
    """Bodies with one bad field."""
    bad: dict[str, list[Any]] = {
        "prompt": [3, True, [], ["a"], {}, "x" * 32_001, 1.5],
        "negative_prompt": [3, ["a"], {}, "x" * 32_001],
        "prompt_syntax": ["a1111", 3, ""],
        "model": [
            3,
            [],
            "nope",
            "../../etc/passwd",
            "/etc/passwd",
            "..",
            "a" * 300,
            "cascade-tiny\u0000",
            "\x1b[31m",
            "",
        ],
        "n": [0, -1, 11, 1.5, "2", True, [1], {}, HUGE, 2**63],
        "size": [
            256,
            "256",
            "256x",
            "x256",
            "256X256",
            "256 x 256",
            "63x256",
            "256x63",
            "4097x64",
            "-256x256",
            "0x0",
            "256x256x3",
            "9" * 39 + "x64",
            "²56x256",
            "\u0662\u0665\u0666x256",
            "256x256\n",
            [],
            {},
            True,
            "a" * 50,
            "4096x4096",
        ],
        "quality": ["best", 3, [], "", "LOW"],
        "background": ["transparent", "red", 3, []],
        "output_format": ["gif", "svg", "PNG", "png ", 3, [], "../png"],
        "output_compression": [-1, 101, 1.5, "50", True, HUGE],
        "response_format": ["url", "bytes", 3],
        "stream": ["yes", 1, [], "true"],
        "partial_images": [-1, 4, 1.5, "2", True],
        "seed": [-1, 2**64, HUGE, 1.5, "7", True, [1], {}],
        "num_inference_steps": [0, -1, 1001, 1.5, "10", True, [], HUGE],
        "guidance_scale": ["1", True, [], {}, 1001, -1001, 1e308, HUGE],
        "decoder_num_inference_steps": [0, 1001, "10", 2.5],
        "decoder_guidance_scale": ["1", 1e10, []],
        "sampler": ["euler", "", 3, "original "],
        "deterministic": ["yes", 1, []],
        "strength": [-0.1, 1.1, "0.5", 0.5, True],
        "image_prompts": [
            "a",
            [3],
            [{}],
            [{"image": 3}],
            [{"image": "!!"}],
            ["/etc/passwd"],
            ["file:///etc/passwd"],
            ["http://127.0.0.1/x.png"],
            ["data:image/png;base64,AAAA"],
            [{"image": "AAAA", "weight": "a"}],
            ["AAAA"] * 9,
        ],
        "init_image": ["/etc/passwd", "AAAA", 3, "data:image/png;base64,!!"],
        "mask_image": ["AAAA", 3],
        "loras": [
            ["a"],
            "x",
            {},
            [3],
            [{}],
            [{"name": 3}],
            [{"name": "../x"}],
            [{"name": "a", "scale": "1"}],
            ["a"] * 17,
        ],
        "control_image": ["/etc/passwd", "AAAA", 3, "data:image/png;base64,!!", []],
        "control_scale": ["1", 11, -11, True, HUGE, []],
        "control_kind": ["depth", "canny", 3, []],
        "control_filtered": ["yes", 1, []],
        "frame_count": [3],
        "frame_duration_ms": [40],
        "svg": [{}],
        "user": [3, "x" * 1001],
        "safety_identifier": [3],
    }
    for name, values in bad.items():
        for value in values:
            yield name, {"prompt": "a star", name: value}


FIELDS = list(_fields())


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"prompt=a star",
    "half": b'{"prompt": "a',
    "a list": b'["a star"]',
    "a text": b'"a star"',
    "a number": b"3",
    "null": b"null",
    "no prompt": b"{}",
    "prompt is null": b'{"prompt": null}',
    "broken UTF-8": b'{"prompt": "\xff\xfe"}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "UTF-16": '{"prompt": "a star"}'.encode("utf-16"),
    "NaN": b'{"prompt": "a star", "guidance_scale": NaN}',
    "Infinity": b'{"prompt": "a star", "guidance_scale": Infinity}',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep unknown field": b'{"prompt": "a star", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "5,000 digits": b'{"prompt": "a star", "seed": ' + b"9" * 5000 + b"}",
    "trailing text": b'{"prompt": "a star"} {"prompt": "b"}',
    "a comment": b'{"prompt": "a star" /* x */}',
    "zero bytes": b"\0" * 1000,
}

FILES: dict[str, list[tuple[str, Any]]] = {
    "no picture": [("prompt", (None, "a star"))],
    "an empty picture": [("prompt", (None, "a star")), ("image", ("a.png", b""))],
    "garbage": [("prompt", (None, "a star")), ("image", ("a.png", b"garbage" * 100))],
    "a bomb": [("prompt", (None, "a star")), ("image", ("a.png", bomb()))],
    "half a picture": [("prompt", (None, "a star")), ("image", ("a.png", png((300, 300))[:200]))],
    "a picture as text": [("prompt", (None, "a star")), ("image", (None, "/etc/passwd"))],
    "two pictures": [("prompt", (None, "a star")), ("image[]", ("a.png", png())), ("image[]", ("b.png", png()))],
    "two masks": [("image", ("a.png", png())), ("mask", ("a.png", png())), ("mask", ("b.png", png()))],
    "a mask of another size": [
        ("prompt", (None, "a star")),
        ("image", ("a.png", png())),
        ("mask", ("m.png", png((32, 32)))),
    ],
    "another file": [("prompt", (None, "a star")), ("image", ("a.png", png())), ("markup", ("b.png", png()))],
    "a field twice": [("prompt", (None, "a")), ("prompt", (None, "b")), ("image", ("a.png", png()))],
    "n is a word": [("prompt", (None, "a")), ("n", (None, "two")), ("image", ("a.png", png()))],
    "n is a number in words": [("prompt", (None, "a")), ("n", (None, "1.5")), ("image", ("a.png", png()))],
    "strength is NaN": [("prompt", (None, "a")), ("strength", (None, "NaN")), ("image", ("a.png", png()))],
    "strength is too much": [("prompt", (None, "a")), ("strength", (None, "2")), ("image", ("a.png", png()))],
    "loras": [("prompt", (None, "a")), ("loras[][a]", (None, "1")), ("loras", (None, "1")), ("image", ("a", png()))],
    "many files": [("image", (f"{i}.png", png())) for i in range(40)],
    "many fields": [(f"f{i}", (None, "1")) for i in range(300)],
    "two control pictures": [
        ("prompt", (None, "a")),
        ("image", ("a.png", png())),
        ("control_image", ("b.png", png())),
        ("control_image", ("c.png", png())),
    ],
    "objects of two lengths": [
        ("prompt", (None, "a")),
        ("image", ("a", png())),
        ("loras[][name]", (None, "a")),
        ("loras[][name]", (None, "b")),
        ("loras[][scale]", (None, "1")),
    ],
    "a text and an object": [
        ("prompt", (None, "a")),
        ("image", ("a", png())),
        ("loras", (None, "a")),
        ("loras[][scale]", (None, "1")),
    ],
    "a path as a file name": [("prompt", (None, 3 * "../")), ("image", ("../../../etc/passwd", b"x"))],
}


def check_refusal(answer: Any) -> None:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 700
    assert error["message"].isprintable()
    assert "Traceback" not in answer.text
    assert "root:" not in answer.text  # of /etc/passwd
    assert answer.headers["x-request-id"]


def test_there_are_enough_cases() -> None:
    assert len(FIELDS) + len(BODIES) + len(FILES) >= 150


def test_bad_fields(service: Service) -> None:
    with service.http() as http:
        for name, body in FIELDS:
            text = json.dumps(body)
            answer = http.post(GENERATIONS, content=text, headers={"content-type": "application/json"})
            try:
                check_refusal(answer)
                param = answer.json()["error"]["param"]
                assert param in (name, "image" if name in ("strength", "init_image") else "mask", "seed")
            except AssertionError as error:
                raise AssertionError(f"{text[:200]}: {answer.status_code} {answer.text[:300]}") from error
    assert service.load == 0


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies(service: Service, name: str) -> None:
    with service.http() as http:
        check_refusal(http.post(GENERATIONS, content=BODIES[name], headers={"content-type": "application/json"}))


@pytest.mark.parametrize("name", FILES)
def test_bad_forms(service: Service, name: str) -> None:
    with service.http() as http:
        check_refusal(http.post(EDITS, files=FILES[name]))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_other_kinds_of_bodies(service: Service, kind: str) -> None:
    with service.http() as http:
        check_refusal(http.post(GENERATIONS, content=b'{"prompt": "a star"}', headers={"content-type": kind}))


@pytest.mark.parametrize(
    "kind",
    ["application/json", "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=x"],
)
def test_forms_that_are_none(service: Service, kind: str) -> None:
    with service.http() as http:
        check_refusal(http.post(EDITS, content=b"--x\r\ngarbage", headers={"content-type": kind}))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/images/variations",
        "/v1/models/x",
        "/v1/models/..%2f..%2fetc",
        "/page/..%2f..%2fcli.py",
        "/page/",
        "/a",
        "/v1/images/jobs/x",
        "/v1/images/jobs/" + "x" * 5000,
        "/%00",
        "/v1/models/%ff",
        "//v1/models",
        "/metrics/x",
    ],
)
def test_paths_that_are_not_there(service: Service, path: str) -> None:
    with service.http() as http:
        check_refusal(http.get(path))


@pytest.mark.parametrize(
    ("method", "path"), [("GET", GENERATIONS), ("PUT", EDITS), ("POST", "/"), ("DELETE", "/metrics")]
)
def test_other_methods(service: Service, method: str, path: str) -> None:
    with service.http() as http:
        check_refusal(http.request(method, path))


def raw(service: Service, data: bytes, seconds: float = 20.0) -> bytes:
    """What the service answers to these bytes."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=seconds) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
                if b"\r\n\r\n" in answer:
                    break
        except ConnectionResetError:
            pass
        return answer


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n" + b"".join(b"h%d: %s\r\n" % (i, b"x" * 500) for i in range(1000)) + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-length: " + b"9" * 30 + b"\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
    ids=["garbage", "flood", "long path", "length", "two lengths", "long length", "chunk", "TLS"],
)
def test_broken_http(service: Service, data: bytes) -> None:
    answer = raw(service, data + b"\r\n\r\n")
    assert answer == b"" or answer.split()[1].startswith(b"4"), answer[:200]
    with service.http() as http:
        assert http.get("/health/ready").status_code == 200
