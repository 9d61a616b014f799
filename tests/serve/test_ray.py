"""The service over replicas of Ray Serve."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from openai import OpenAI

from cascade_rt import CascadePipeline

from .conftest import pixels_of, wait_until

PYTHON = sys.executable if importlib.util.find_spec("ray") else os.environ.get("CASCADE_RAY_PYTHON", "")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON,
        reason="Ray is not installed: pip install 'cascade-rt[ray]', here or in an environment whose python is named "
        "as CASCADE_RAY_PYTHON",
    ),
]


class RayService:
    def __init__(self, folder: Path, *argv: str) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'engines/tiny'}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [PYTHON, "-m", "cascade_rt.serve.cli", "--port", "0", "--provider", "cpu", "--ray", *argv],
            env=environment,
            stderr=self.log,
            stdout=self.log,
            start_new_session=True,
        )
        self.url = ""
        try:
            wait_until(self.ready, 180)
        except AssertionError:
            self.close()
            pytest.fail(self.said()[-3000:])
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="test", max_retries=8, timeout=60)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def ready(self) -> bool:
        assert self.process.poll() is None, self.said()
        found = re.search(r"cascade-serve: (http://\S+)", self.said())
        if found is None:
            return False
        self.url = found[1]
        try:
            return httpx2.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def replicas(self) -> list[int]:
        """Process ids of this service's replicas."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    name = (folder / "cmdline").read_bytes()
                    session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
                except (OSError, ValueError):
                    continue
                if name.startswith(b"ray::ServeReplica:cascade-rt") and session == self.process.pid:
                    found.append(int(folder.name))
        return found

    def close(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # what Ray started is of the same session
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.log.close()


@pytest.fixture(scope="module")
def ray_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayService]:
    service = RayService(tmp_path_factory.mktemp("ray"), "--workers", "2", "--queue", "32")
    yield service
    assert service.close() == 0


def test_pictures_and_previews_are_the_same(ray_service: RayService, pipe: CascadePipeline) -> None:
    answer = ray_service.client.images.generate(prompt="a red circle", n=2, extra_body={"seed": 4})
    mine = np.asarray(pipe("a red circle", seed=5).images[0]).astype(int)
    assert np.abs(pixels_of(answer.data[1].b64_json) - mine).max() <= 1
    events = ray_service.client.images.generate(
        prompt="a red circle", stream=True, partial_images=2, extra_body={"seed": 5}, output_format="png"
    )
    *previews, last = list(events)
    assert [event.partial_image_index for event in previews] == [0, 1]
    assert np.abs(pixels_of(last.b64_json) - mine).max() <= 1


def test_refusals_come_through(ray_service: RayService) -> None:
    with httpx2.Client(base_url=ray_service.url) as http:
        answer = http.post("/v1/images/generations", json={"prompt": "x", "size": "4096x4096"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "size")
        answer = http.post("/v1/images/generations", json={"prompt": "x", "image_prompts": ["AAAA"]})
        assert answer.status_code == 400


def test_a_client_that_leaves_frees_the_replica(ray_service: RayService) -> None:
    body = {"prompt": "a star", "num_inference_steps": 1000, "n": 10}
    with httpx2.Client(base_url=ray_service.url) as http:
        for _ in range(8):  # 80 pictures; two replicas take 64
            with pytest.raises(httpx2.ReadTimeout):
                http.post("/v1/images/generations", json=body, timeout=0.5)
        short = {"prompt": "a star", "num_inference_steps": 2, "decoder_num_inference_steps": 1, "n": 10}
        assert http.post("/v1/images/generations", json=short, timeout=60).status_code == 200


def test_a_job_is_cancelled_by_its_id(ray_service: RayService) -> None:
    body = {"prompt": "a star", "num_inference_steps": 1000}
    statuses: list[Any] = []

    def ask() -> None:
        headers = {"x-request-id": "cancel-this-one"}
        answer = httpx2.post(f"{ray_service.url}/v1/images/generations", json=body, headers=headers, timeout=60)
        statuses.extend([answer.status_code, answer.json()["error"]["code"]])

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    with httpx2.Client(base_url=ray_service.url) as http:
        wait_until(lambda: http.get("/v1/images/jobs/cancel-this-one").status_code == 200)
        assert http.delete("/v1/images/jobs/cancel-this-one").json()["cancelled"] is True
        asking.join(30)
        assert statuses == [400, "cancelled"]
        assert http.get("/v1/images/jobs/cancel-this-one").json()["status"] == "cancelled"
        wait_until(lambda: "cascade_pictures_in_work 0.0" in http.get("/metrics").text)
        text = http.get("/metrics").text
    assert 'cascade_pictures_total{model="cascade-tiny",outcome="cancelled"} ' in text
    assert 'cascade_picture_seconds_count{part="stage_c"}' in text


def test_nothing_is_lost_when_a_replica_is_killed(ray_service: RayService, pipe: CascadePipeline) -> None:
    answers: dict[int, str] = {}

    def draw(seed: int) -> None:
        found = ray_service.client.images.generate(prompt="a star", extra_body={"seed": seed})
        answers[seed] = found.data[0].b64_json

    wait_until(lambda: len(ray_service.replicas()) == 2, 60)
    asking = [threading.Thread(target=draw, args=(seed,), daemon=True) for seed in range(20)]
    for one in asking:
        one.start()
    time.sleep(0.7)
    os.kill(ray_service.replicas()[0], signal.SIGKILL)
    wait_until(lambda: not any(one.is_alive() for one in asking), 120)
    assert sorted(answers) == list(range(20))
    for seed in (0, 19):
        mine = np.asarray(pipe("a star", seed=seed).images[0]).astype(int)
        assert np.abs(pixels_of(answers[seed]) - mine).max() <= 1
    wait_until(lambda: len(ray_service.replicas()) == 2, 90)


def test_a_cluster_that_is_not_there_is_said_in_one_line() -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'engines/tiny'}", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [PYTHON, "-m", "cascade_rt.serve.cli", "--port", "0", "--ray", "127.0.0.1:1"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
