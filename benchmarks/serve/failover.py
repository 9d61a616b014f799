"""``kill -9`` of a replica, of both, and of a front, and an update of the replicas, while 64 requests run.

How many requests are lost, how long they wait, and when the service is whole again; last, how long it takes until the
load has brought a second replica (Ray waits for 30 s before it starts one):

    python benchmarks/serve/failover.py --json benchmarks/results/serve_failover.json

Needs Ray: ``pip install 'cascade-rt[ray,onnxruntime]'``, here or in the environment whose python ``--python`` names. It
starts a cluster of this machine, two HTTP fronts and two replicas. The clients are the documented one
(engines/deploy/README.md): OpenAI's own with its retries, which asks the other front where one does not answer. Every
picture is compared with the one that the pipeline draws alone.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray
from openai import APIConnectionError, InternalServerError, OpenAI
from PIL import Image

from cascade_rt import CascadePipeline, LoopSettings, Request

REPLICAS, REQUESTS, SEEDS = 2, 64, 16
STEPS, DECODER_STEPS = 10, 5
START_SECONDS = 240.0
ANSWER_SECONDS = 240.0
KILL_AFTER = 2.0
"""Seconds after all clients have asked."""
REPLICA = b"ray::ServeReplica:cascade-rt"
MARK = "CASCADE_FAILOVER"
Pixels = NDArray[np.int64]


def draw(fronts: Sequence[str], seed: int, first: int) -> str:
    """A picture in base64: the documented client. A front that does not answer is left for the next one."""
    end, turn = time.monotonic() + ANSWER_SECONDS, first
    while True:
        client = OpenAI(base_url=f"{fronts[turn % len(fronts)]}/v1", api_key="none", max_retries=2, timeout=120)
        try:
            own = {"seed": seed, "num_inference_steps": STEPS, "decoder_num_inference_steps": DECODER_STEPS}
            answer = client.images.generate(prompt="a red circle", extra_body=own)
            return str(answer.data[0].b64_json)  # type: ignore[index]
        except (APIConnectionError, InternalServerError):
            if time.monotonic() > end:
                raise
        turn += 1


def references() -> dict[int, Pixels]:
    """The pictures of all seeds, drawn alone."""
    made = {}
    with CascadePipeline.from_pretrained(provider="cpu") as pipe:
        pipe.set_progress_bar_config(disable=True)
        for seed in range(SEEDS):
            request = Request(
                prompt="a red circle",
                seeds=(seed,),
                prior=LoopSettings(num_inference_steps=STEPS),
                decoder=LoopSettings(num_inference_steps=DECODER_STEPS),
            )
            made[seed] = np.asarray(pipe.run(request).images[0]).astype(np.int64)
    return made


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Seconds until a condition holds.

    Raises:
        RuntimeError: it does not in time.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise RuntimeError(f"{what}: not within {seconds} s")
        time.sleep(0.05)
    return time.monotonic() - started


@contextmanager
def running(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own session, which is killed with all that it started."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def address_of(log: Path) -> str | None:
    """Where a front listens, and is ready; None: not yet."""
    found = re.search(r"cascade-serve: (http://\S+)", log.read_text())
    if found is None:
        return None
    try:
        return found[1] if httpx2.get(f"{found[1]}/health/ready", timeout=5).status_code == 200 else None
    except httpx2.TransportError:
        return None


def replicas(mark: str) -> list[int]:
    """Process ids of this cluster's replicas."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            is_one = folder.name.isdecimal() and (folder / "cmdline").read_bytes().startswith(REPLICA)
            if is_one and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def scenario(
    name: str,
    fronts: Sequence[str],
    wanted: dict[int, Pixels],
    kill: Callable[[], None],
    is_whole: Callable[[], bool] | None,
) -> dict[str, Any]:
    """Ask with all clients at once, kill, and see what becomes of the requests.

    Args:
        name: of what is killed.
        fronts: their addresses.
        wanted: the picture of every seed.
        kill: does it.
        is_whole: whether what was killed is there again; None: nothing will be.
    """
    waits: list[tuple[float, float]] = []  # when it was answered, how long that took
    wrong: list[str] = []
    started = time.monotonic()

    def ask(number: int) -> None:
        begun = time.monotonic()
        seed = number % SEEDS
        try:
            text = draw(fronts, seed, number)
        except Exception as error:  # whatever it is, the request is lost
            wrong.append(repr(error)[:200])
            return
        waits.append((time.monotonic(), time.monotonic() - begun))
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(np.int64)
        if np.abs(pixels - wanted[seed]).max() > 1:
            wrong.append("another picture")

    asking = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(REQUESTS)]
    for one in asking:
        one.start()
    time.sleep(KILL_AFTER)
    killed, before = time.monotonic(), len(waits)
    kill()
    whole: list[float] = []

    def done() -> bool:
        if is_whole is not None and not whole and is_whole():
            whole.append(time.monotonic() - killed)
        return not any(one.is_alive() for one in asking)

    wait_until(done, ANSWER_SECONDS + 60, "all answers")
    wait_until(lambda: done() and (is_whole is None or bool(whole)), START_SECONDS, "a whole service")
    after = sorted(at - killed for at, _ in waits if at > killed)
    gaps = np.diff([0.0, *after])
    return {
        "killed": name,
        "requests": REQUESTS,
        "answered_before": before,
        "lost": REQUESTS - len(waits),
        "wrong": sorted(set(wrong)),
        "first_answer_after_s": round(after[0], 2) if after else None,
        "longest_silence_s": round(float(gaps.max()), 2) if len(gaps) else None,
        "longest_wait_s": round(max(wait for _, wait in waits), 2),
        "all_answered_after_s": round(after[-1], 2) if after else None,
        "whole_again_s": round(whole[0], 2) if whole else None,
        "seconds": round(time.monotonic() - started, 1),
    }


def scale_up(front: str, is_scaled: Callable[[], bool]) -> dict[str, Any]:
    """Seconds of load until there are more replicas."""
    ended, answered, lost = threading.Event(), [0], [0]

    def ask(number: int) -> None:
        while not ended.is_set():
            try:
                draw([front], number % SEEDS, 0)
                answered[0] += 1
            except Exception:  # whatever it is, the request is lost
                lost[0] += 1

    asking = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(REQUESTS // 2)]
    for one in asking:
        one.start()
    seconds = wait_until(is_scaled, START_SECONDS, "a second replica")
    ended.set()
    wait_until(lambda: not any(one.is_alive() for one in asking), ANSWER_SECONDS + 60, "all answers")
    return {"scaled": "1 to 2 replicas", "seconds": round(seconds, 1), "answered": answered[0], "lost": lost[0]}


def main() -> int:
    """Run all scenarios; 1 where a request was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of an environment with Ray (default: this one)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    mark, rows, load = uuid.uuid4().hex, [], os.getloadavg()[0]
    wanted = references()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        MARK: mark,
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    head = ["-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    head += ["--num-cpus=4", "--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats"]
    front = ["-m", "cascade_rt.serve.cli", "--port", "0", "--provider", "cpu", "--queue", "128"]
    front += ["--workers", str(REPLICAS), "--ray", f"127.0.0.1:{port}"]
    with tempfile.TemporaryDirectory(prefix="cascade-failover-") as name, ExitStack() as stack:
        folder = Path(name)
        stack.enter_context(running([args.python, *head], environment, folder / "ray"))
        wait_until(lambda: _listens(port), 60, "Ray's head")
        logs = [folder / "front-0", folder / "front-1"]

        def start(log: Path, *more: str) -> subprocess.Popen[bytes]:
            made = stack.enter_context(running([args.python, *front, *more], environment, log))
            wait_until(lambda: address_of(log) is not None or made.poll() is not None, START_SECONDS, "a front")
            if made.poll() is not None:
                raise RuntimeError(log.read_text())
            return made

        processes = [start(log) for log in logs]
        fronts = [str(address_of(log)) for log in logs]
        gone: set[int] = set()

        def whole() -> bool:
            return len(found := replicas(mark)) == REPLICAS and not gone & set(found)

        wait_until(whole, START_SECONDS, "replicas")

        def kill_replicas(count: int) -> None:
            gone.update(killed := replicas(mark)[:count])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

        def update() -> None:
            gone.update(replicas(mark))
            start(folder / "front-2", "--max-batch", "12")  # another version: the replicas are replaced, one by one

        for what, kill, is_whole in (
            ("nothing", lambda: None, None),
            ("a replica of two", lambda: kill_replicas(1), whole),
            ("both replicas", lambda: kill_replicas(2), whole),
            ("nothing: the replicas are updated", update, whole),
            ("a front of two", processes[0].kill, None),
        ):
            rows.append(scenario(what, fronts, wanted, kill, is_whole))
            print(json.dumps(rows[-1]), flush=True)
        scaling = folder / "front-3"
        start(scaling, "--workers", "1-2")
        wait_until(lambda: len(replicas(mark)) == 1, START_SECONDS, "one replica")
        rows.append(scale_up(str(address_of(scaling)), lambda: len(replicas(mark)) == REPLICAS))
        print(json.dumps(rows[-1]), flush=True)
    machine = {"cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]}
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 1 if any(row["lost"] or row.get("wrong") for row in rows) else 0


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
